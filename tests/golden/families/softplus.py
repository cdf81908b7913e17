"""Softplus attention (arXiv 2501.13428): the operator, its baselines, and a whole layer with rotary positions.

Letters: B batch, H query heads, Hk key/value heads, T queries, S keys, D, Dv head sizes; files store [B, H, T, D].
Masks come as booleans [B, T, S]; they are expressed as a `Mask`, or row by row where no Mask says the same.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.normalised_family import FORMS, Form, family_attention, kernel_options, unit_vectors
from attnlab.attention.softplus import SoftplusAttention, SoftplusConfig
from kernels import masks
from kernels.masks import Mask
from kernels.softplus import softplus_attention
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("reference", "blockwise")
STATISTICS = ("Z", "tau", "M", "W")
PHI = {
    "softplus": "softplus",
    "softmax": "exp",
    "exp": "exp",
    "ssmax": "exp",
    "sigmoid": "sigmoid",
    "relu": "relu",
}
NORMALISE = {"l1": "l1", "none": "none", "no": "none", "null": "none", "false": "none", "1/n": "1/n", "n": "1/n",
             "over_n": "1/n", "count": "1/n"}  # fmt: skip
OF_KIND = {"sigmoid": "none", "relu": "1/n"}  # normalisation of a kind that does not name one
BIASES = {"none": "none", "0": "none", "-logn": "minus_logn", "minus_logn": "minus_logn", "alibi": "alibi"}
SCALES = {"rsqrtd": "rsqrtd", "1/sqrt(d)": "rsqrtd", "logd_logn": "logd_logn",
          "logd_logn_rsqrtd": "logd_logn_rsqrtd", "logn_rsqrtd": "learned_logn_rsqrtd",
          "s_logn_rsqrtd": "learned_logn_rsqrtd", "s_h*logn_rsqrtd": "learned_logn_rsqrtd"}  # fmt: skip
SYNONYMS = {"power": "p", "reweight_power": "p", "normalize": "normalise", "norm": "normalise", "warm": "warm_rows",
            "phi_power": "p1", "relu_power": "p1", "logit_gain": "gain", "rtol": "degenerate_rtol",
            "degenerate_tolerance": "degenerate_rtol", "o": "offset", "count": "n", "fixed_n": "n"}  # fmt: skip


def settings_of(*sources: dict) -> dict:
    """Settings under one name each; later sources win."""
    return {SYNONYMS.get(name, name): value for source in sources for name, value in source.items()}


def lookup(table: dict, value, what: str):
    key = str(value).lower().replace(" ", "")
    if key not in table:
        raise Unsupported(f"{what}={value!r} is unknown; known: {', '.join(table)}")
    return table[key]


def form_of(settings: dict) -> Form:
    """The Form of a kind such as "softplus", "relu+l1" or "sigmoid", with what else the settings say."""
    kind, _, suffix = str(settings["kind"]).lower().partition("+")
    p1 = settings.get("p1", 1)
    if kind.startswith("relu") and kind != "relu":  # relu2, relu^2
        kind, p1 = "relu", float(kind[4:].lstrip("^*"))
    if kind in ("lssa", "lssar"):
        kind = "softplus"
    given = settings.get("normalise", suffix or OF_KIND.get(kind, "l1"))
    scale = settings.get("scale", "s_logn_rsqrtd" if kind == "ssmax" else "logd_logn")
    bias = settings.get("bias", "minus_logn" if kind == "sigmoid" else "none")
    power = settings.get("p")
    return Form(
        phi=lookup(PHI, settings.get("phi", kind), "kind"),
        phi_power=float(p1),
        scale=lookup(SCALES, scale, "scale"),
        bias=lookup(BIASES, bias, "bias"),
        normalise=lookup(NORMALISE, given, "normalise"),
        qk_norm=bool(settings.get("qk_norm", True)),
        power=None if power in (None, "none", 0) else float(power),
    )


def options_of(settings: dict) -> dict:
    """The remaining options of the kernel; Unsupported for a setting nobody knows."""
    form = {"kind", "phi", "p1", "scale", "bias", "normalise", "qk_norm", "p", "gain"}
    names = {"offset": "offset", "warm_rows": "warm_rows", "degenerate": "degenerate", "n": "counts",
             "degenerate_rtol": "degenerate_tolerance"}  # fmt: skip
    if unknown := settings.keys() - form - names.keys():
        raise Unsupported(f"setting {', '.join(sorted(unknown))} is unknown")
    return {names[name]: value for name, value in settings.items() if name in names and value is not None}


def mask_of(golden: Golden, B: int, T: int, S: int) -> tuple[Mask | None, np.ndarray]:
    """The Mask that says what in.mask says, or None if there is none; and in.mask, [B, T, S]."""
    inputs, kind = golden.inputs, golden.meta.get("mask", "causal")
    causal = (
        not str(kind).lower().replace("-", "").replace("_", "").startswith(("noncausal", "full", "bidir"))
    )
    fields = {
        "causal": causal,
        "q_offset": S - T if causal else 0,
        "window": golden.meta.get("window") if causal else None,
    }
    segments = inputs.get("segment_ids", np.ones((B, S), np.int32))
    if "segment_ids" in inputs or "key_mask" in inputs:
        fields["kv_segments"] = np.where(inputs.get("key_mask", True), segments, 0).astype(np.int32)
        fields["q_segments"] = segments[:, S - T :].astype(np.int32)
    mask = Mask(**fields)
    dense = np.broadcast_to(masks.dense(masks.validate(mask, B, T, S), T, S), (B, T, S))
    wanted = inputs.get("mask", dense).astype(bool)
    wanted = np.broadcast_to(wanted, (B, T, S))
    return (mask if np.array_equal(dense, wanted) else None), wanted


def operator(golden: Golden, settings: dict, implementation: str, weights: bool = True):
    """A function (q, k, v, s) -> (out, extra results by name), all in the files' layout."""
    q, k = golden.inputs["q"], golden.inputs["k"]
    (B, H, T, D), S = q.shape, k.shape[2]
    form, options = form_of(settings), options_of(settings) | {"implementation": implementation}
    mask, dense = mask_of(golden, B, T, S)

    def compute(q, k, v, s):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        if form.qk_norm:
            q, k = unit_vectors(q), unit_vectors(k)
        of_form = kernel_options(form, H, D, s if form.learns_scale else None, None, settings.get("gain"))
        attend = softplus_attention if mask is not None else row_by_row
        values = v
        if weights:  # the output for unit values is the weights
            unit = jnp.broadcast_to(jnp.eye(S, dtype=v.dtype)[:, None], (*v.shape[:3], S))
            values = jnp.concatenate([v, unit], axis=-1)
        out, rows = attend(
            q, k, values, **of_form, **options, mask=dense if mask is None else mask, return_statistics=True
        )
        out, R = jnp.split(out.swapaxes(1, 2), [v.shape[-1]], axis=-1)
        extra = {name: x.swapaxes(1, 2) for name, x in zip(STATISTICS, rows, strict=True)}
        return out, extra | {"weights": R}

    return compute


def row_by_row(q, k, v, *, mask, **options):
    """Any boolean mask [B, T, S]: every query row is a batch row of its own, and its visible keys are a segment."""
    B, T = q.shape[:2]
    visible = jnp.asarray(mask, jnp.int32).reshape(B * T, -1)
    rows = Mask(causal=False, q_segments=jnp.ones((B * T, 1), jnp.int32), kv_segments=visible)
    k, v = (jnp.repeat(x, T, axis=0) for x in (k, v))
    result = softplus_attention(q.reshape(B * T, 1, *q.shape[2:]), k, v, mask=rows, **options)
    return jax.tree.map(lambda x: x.reshape(B, T, *x.shape[2:]), result)


def wide(x):
    """float64, also of what is stored in float32: the files' numbers were computed in float64."""
    return jnp.asarray(x, jnp.float64)


def learned_scale(golden: Golden, H: int):
    params = golden.params
    return wide(next((params[name] for name in ("ssmax_s", "s", "ssmax.s") if name in params), np.ones(H)))


def run(computations: dict, golden: Golden) -> dict:
    """By name: (out, extra results, gradients of sum(out * cotangent) for q, k, v and s); all in one program."""
    inputs, cotangent = golden.inputs, wide(golden.cotangents["out"])
    operands = [wide(inputs[name]) for name in "qkv"] + [learned_scale(golden, inputs["q"].shape[1])]

    def one(compute, operands):
        def loss(*operands):
            out, extra = compute(*operands)
            return jnp.sum(out * cotangent), (out, extra)

        gradients, results = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*operands)
        return *results, dict(zip("qkvs", gradients, strict=True))

    return jax.jit(lambda *operands: {name: one(f, operands) for name, f in computations.items()})(*operands)


def is_attention(golden: Golden) -> bool:
    known = {"q", "k", "v"} <= golden.inputs.keys()
    return known and golden.meta.get("function") == "attention" and "kind" in golden.meta.get("kw", {})


@family("softplus attention", when=is_attention)
def attention(golden: Golden):
    meta = {name: golden.meta[name] for name in ("degenerate_rtol",) if name in golden.meta}
    settings = settings_of(meta, golden.meta["kw"])
    for implementation in IMPLEMENTATIONS:
        compute = operator(golden, settings, implementation, weights="out.weights" in golden.results)
        out, extra, gradients = run({"": compute}, golden)[""]
        extra = {f"out.{name}": x for name, x in extra.items()}
        yield implementation, {"out.out": out} | extra | {f"grad.{n}": x for n, x in gradients.items()}


def is_baselines(golden: Golden) -> bool:
    defs = golden.meta.get("defs")
    return golden.meta.get("function") == "baselines" and isinstance(defs, dict) and "q" in golden.inputs


@family("baselines of softplus attention", when=is_baselines)
def baselines(golden: Golden):
    meta = {name: golden.meta[name] for name in ("degenerate_rtol",) if name in golden.meta}
    for implementation in IMPLEMENTATIONS:
        computations = {
            name: operator(golden, settings_of(meta, kw), implementation, weights=False)
            for name, kw in golden.meta["defs"].items()
        }
        found = {}
        for name, (out, _, gradients) in run(computations, golden).items():
            found |= {f"out.{name}": out} | {f"grad.{name}.{x}": g for x, g in gradients.items()}
        yield implementation, found


def is_layer(golden: Golden) -> bool:
    variant = golden.meta.get("settings", {}).get("variant")
    return golden.meta.get("function") == "layer" and (variant in FORMS or variant in ("lssa", "lssar"))


def layer_config(golden: Golden, implementation: str) -> SoftplusConfig:
    """The mixer's options; Unsupported for a setting nobody knows."""
    settings = settings_of(golden.meta["settings"])
    rope = settings.pop("rope", "half-split")
    if rope and str(rope).lower() not in ("none", "false") and not str(rope).lower().startswith("half"):
        raise Unsupported(f"rope={rope!r} is unknown; the layer rotates in the half-split layout")
    power = settings.pop("p", None)
    params, x = golden.params, golden.inputs["x"]
    sizes = dict(golden.meta["shapes"])
    D = sizes.get("D") or params["wq"].shape[1] // sizes["H"]
    given = {
        "variant": settings.pop("variant"),
        "rope": bool(rope) and str(rope).lower() not in ("none", "false"),
        "rope_theta": float(settings.pop("rope_base", settings.pop("rope_theta", 10000.0))),
        "qk_norm": {None: "", True: "on", False: "off"}[settings.pop("qk_norm", None)],
        "logit_gain": float(settings.pop("gain", None) or 0),
        "scale": lookup(SCALES, settings["scale"], "scale") if "scale" in settings else "",
    }
    if given["variant"] != "lssa" and power is not None:
        given["power"] = float(power)
    settings.pop("scale", None)
    for name in ("offset", "warm_rows", "degenerate", "window"):
        value = settings.pop(name, None)
        if value is not None:
            given[name] = float(value) if name == "offset" else value
    if settings:
        raise Unsupported(f"setting {', '.join(sorted(settings))} is unknown")
    config = SoftplusConfig(
        num_heads=params["wq"].shape[1] // D, num_kv_heads=params["wk"].shape[1] // D, head_dim=D,
        implementation=implementation, **given,
    )  # fmt: skip
    return config.resolve(0, 0, 0, x.shape[-1])


@family("softplus attention layer", when=is_layer)
def layer(golden: Golden):
    x, params = wide(golden.inputs["x"]), golden.params
    names = {"wq": "query", "wk": "key", "wv": "value", "wo": "out"}
    positions = jnp.arange(x.shape[1])[None]
    segments = golden.inputs.get("segment_ids", golden.inputs.get("key_mask"))
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    if segments is not None:  # positions count from the first token of each document
        change = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        positions = positions - jax.lax.cummax(jnp.where(change, positions, 0), axis=1)

    for implementation in IMPLEMENTATIONS:
        config = layer_config(golden, implementation)
        module = SoftplusAttention(config=config, hidden_size=x.shape[-1], dtype=jnp.float64)

        def loss(weights, x, module=module):
            tree = {"params": {names[name]: {"kernel": w} for name, w in weights.items()}}
            y = module.apply(tree, x, positions=positions, segments=segments)
            return jnp.sum(y * wide(golden.cotangents["out"])), (y, weights_of(module, tree, x))

        def weights_of(module, tree, x):
            q, k, _ = module.apply(tree, x, positions, method="heads")
            B, S, K, _ = k.shape
            unit = jnp.broadcast_to(jnp.eye(S, dtype=x.dtype)[:, None], (B, S, K, S))
            mask = Mask(window=module.config.window or None, q_segments=segments, kv_segments=segments)
            options = module.apply(tree, method="family_options")
            R = family_attention(
                q, k, unit, **options, mask=mask, implementation=module.config.implementation
            )
            return R.swapaxes(1, 2)

        weights = {name: wide(w) for name, w in params.items()}
        (dw, dx), (y, R) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
        yield implementation, {
            "out.out": y, "out.weights": R, "grad.x": dx, **{f"grad.{name}": g for name, g in dw.items()},
        }  # fmt: skip
