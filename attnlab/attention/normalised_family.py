"""One function for every attention phi(score), normalised, perhaps sharpened: baselines and ablations of softplus.py.

    weights = sharpen_p( normalise( phi(c_i q_i.k_j + b_ij) over the visible keys ) )

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D, Dv head sizes; i a query row, j a key, n_i the
keys row i sees. A `Form` names one choice of each part and `FORMS` the usual ones, from the paper (arXiv 2501.13428),
sigmoid attention (2409.04431), ReLU attention (2309.08586), scalable softmax (2501.19399) and ALiBi (2108.12409).
Every form, exp included, runs on `kernels.softplus`, so each has a dense and a linear-memory implementation.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnlab.attention.softmax import alibi_slopes
from kernels.masks import Mask
from kernels.signatures import Array, Float, Num, checked
from kernels.softplus import RowStatistics, softplus_attention
from kernels.softplus.arguments import NORMALISE, PHI

SCALES = ("rsqrtd", "logd_logn", "logd_logn_rsqrtd", "learned_logn_rsqrtd")
BIASES = ("none", "minus_logn", "alibi")


@dataclasses.dataclass(frozen=True)
class Form:
    """One member of the family; the defaults are LSSA."""

    phi: str = "softplus"  # or "exp", "sigmoid", "relu"
    phi_power: float = 1.0  # of relu(s)^q
    scale: str = (
        "logd_logn"  # c_i: log D log n_i; "rsqrtd": 1/sqrt(D); "learned_..." has s_h in place of log D
    )
    bias: str = "none"  # b_ij: "minus_logn": -log n_i; "alibi": -slope_h |i - j|
    normalise: str = "l1"  # each row sums to 1; "none"; "1/n": divided by n_i
    qk_norm: bool = True  # unit queries and keys
    power: float | None = None  # p; None: not sharpened

    def __post_init__(self):
        for name, allowed in (("phi", PHI), ("scale", SCALES), ("bias", BIASES), ("normalise", NORMALISE)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(map(repr, allowed))}"
                )

    @property
    def uses_count(self) -> bool:
        """Whether n_i enters at all."""
        counted = "logn" in self.scale or self.bias == "minus_logn" or self.normalise == "1/n"
        return counted or self.power is not None

    @property
    def learns_scale(self) -> bool:
        return self.scale == "learned_logn_rsqrtd"


_PLAIN = {"scale": "rsqrtd", "qk_norm": False}
FORMS: dict[str, Form] = {
    "lssa": Form(),
    "lssar": Form(power=15.0),
    "softmax": Form(phi="exp", **_PLAIN),
    "softmax_alibi": Form(phi="exp", bias="alibi", **_PLAIN),
    "ssmax": Form(phi="exp", scale="learned_logn_rsqrtd", qk_norm=False),
    "qknorm_softmax_logdlogn": Form(phi="exp"),
    "sigmoid": Form(phi="sigmoid", bias="minus_logn", normalise="none", **_PLAIN),
    "relu_over_n": Form(phi="relu", normalise="1/n", **_PLAIN),
    "relu_l1": Form(phi="relu", **_PLAIN),
    "relu2_l1": Form(phi="relu", phi_power=2.0, **_PLAIN),
    "sigmoid_l1": Form(phi="sigmoid", bias="minus_logn", **_PLAIN),
    "softmax_reweight": Form(phi="exp", power=15.0, **_PLAIN),
    "sigmoid_l1_reweight": Form(phi="sigmoid", bias="minus_logn", power=15.0, **_PLAIN),
    "softplus_none": Form(normalise="none"),
    "softplus_over_n": Form(normalise="1/n"),
    "softplus_l1_legacy": Form(scale="logd_logn_rsqrtd", qk_norm=False),
    "softplus_l1_legacy_reweight": Form(scale="logd_logn_rsqrtd", qk_norm=False, power=15.0),
    "softplus_l1_rsqrtd": Form(**_PLAIN),
}
"""The named members; "lssa" and "lssar" are the paper's, "..._legacy" those of its first versions."""


def find_form(form: Form | str) -> Form:
    """A Form by name, or the given one; ValueError naming the known ones."""
    if isinstance(form, Form):
        return form
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; known: {', '.join(FORMS)}")
    return FORMS[form]


@checked
def unit_vectors(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """x / |x| per head: x rsqrt(sum x^2 + eps), in float32 at least; zero vectors stay zero. Returns x's dtype.

    eps is 1e-12, and 1e-30 in float64, where less of it would be seen.
    """
    z = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    eps = 1e-30 if z.dtype == jnp.float64 else 1e-12
    return (z * jax.lax.rsqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True) + eps)).astype(x.dtype)


@checked
def family_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    form: Form | str = "lssar",
    learned_scale: Float[Array, " H"] | None = None,
    learned_power: Float[Array, " H"] | None = None,
    *,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    counts: float | Num[Array, "B T"] | None = None,
    logit_gain: float | None = None,
    offset: float = 1.0,
    warm_rows: int = 3,
    degenerate: str = "zero",
    return_statistics: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H Dv"] | tuple[jax.Array, RowStatistics]:
    """Attention of one `Form`, in memory linear in T and S unless implementation="reference".

    Args:
        q, k, v: any one float dtype; K divides H, query head h reads key/value head h // (H / K).
        form: a Form, or a name of FORMS.
        learned_scale: s_h of scale="learned_logn_rsqrtd" (scalable softmax), required there and refused elsewhere.
        learned_power: p of each head, with gradient, in place of form.power.
        mask: visibility; causal by default.
        counts: n_i in place of the number of visible keys, a number or [B, T].
        logit_gain: in place of log D in the scales that have it (the paper tuned log D at D = 64, n = 1024).
        offset, warm_rows, degenerate, return_statistics, implementation: see `kernels.softplus.softplus_attention`.

    Returns: o in q's dtype, zero in rows that see no key; with return_statistics also RowStatistics.

    Raises: ValueError for an unknown name, a scale or power that does not go with the form, and what the
        kernel refuses.
    """
    form = find_form(form)
    if form.qk_norm:
        q, k = unit_vectors(q), unit_vectors(k)
    options = kernel_options(form, q.shape[2], q.shape[3], learned_scale, learned_power, logit_gain)
    return softplus_attention(
        q, k, v, **options, mask=mask, counts=counts, offset=offset, warm_rows=warm_rows,
        degenerate=degenerate, return_statistics=return_statistics, implementation=implementation,
    )  # fmt: skip


def kernel_options(
    form: Form,
    num_heads: int,
    head_dim: int,
    learned_scale: Array | None = None,
    learned_power: Array | None = None,
    logit_gain: float | None = None,
) -> dict:
    """The arguments of `kernels.softplus.softplus_attention` a form stands for; unit vectors are up to the caller."""
    if form.learns_scale != (learned_scale is not None):
        raise ValueError(
            f"learned_scale goes with scale='learned_logn_rsqrtd' and nothing else, got {form.scale=} "
            f"and learned_scale {'missing' if learned_scale is None else 'given'}"
        )
    if learned_power is not None and form.power is None:
        raise ValueError("learned_power is given to a form without power; give the form a power")
    if logit_gain is not None and "logd" not in form.scale:
        raise ValueError(f"logit_gain={logit_gain} replaces log D, which scale={form.scale!r} does not have")
    gain = 1.0
    if "logd" in form.scale:
        gain = math.log(head_dim) if logit_gain is None else logit_gain
    elif form.learns_scale:
        gain = learned_scale.astype(jnp.promote_types(jnp.float32, learned_scale.dtype))
    return {
        "gain": gain / math.sqrt(head_dim) if form.scale.endswith("rsqrtd") else gain,
        "power": form.power if learned_power is None else learned_power,
        "phi": form.phi,
        "phi_power": form.phi_power,
        "log_count": "logn" in form.scale,
        "log_bias": form.bias == "minus_logn",
        "slopes": jnp.asarray(alibi_slopes(num_heads), jnp.float32) if form.bias == "alibi" else None,
        "normalise": form.normalise,
    }
