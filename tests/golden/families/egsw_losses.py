"""EGSW and GRPO: losses and their gradients, from log-probabilities or from logits, as two public codes have them.

Names of a file's settings say which loss is meant where the settings alone do not (verl).
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.rl.aggregation import aggregate, divide
from attnlab.rl.config import CorrectionConfig, GRPOConfig, KLConfig, PolicyLossConfig
from attnlab.rl.corrections import entropy_threshold, top_tokens
from attnlab.rl.divergences import divergence
from attnlab.rl.masked import pooled_mean, wide
from attnlab.rl.policy_losses import clip_statistics, policy_loss
from attnlab.rl.sequence_weights import sequence_weights
from attnlab.rl.surrogate import loss_terms, surrogate
from tests.golden.families.egsw import IMPLEMENTATIONS, compiled, flat, grouped, of_logits, weight_config
from tests.golden.registry import Golden, Unsupported, family

AGGREGATIONS = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "seq_sum_const",
}
DEFAULTS = {
    "loss_type": "grpo", "level": "token", "beta": 0.0, "eps": 0.2, "eps_hi": None, "delta": None, "max_len": None,
    "top_q": 1.0, "ent_coef": 0.0, "bias_kl": False, "on_policy": False, "use_is": False, "egsw": None,
    "stop_gradient": True,
}  # fmt: skip


def settings_of(golden: Golden, settings: dict) -> dict:
    """A loss's settings over the file's defaults over those of all files."""
    merged = DEFAULTS | golden.meta.get("defaults", {}) | settings
    unknown = merged.keys() - DEFAULTS.keys()
    if unknown:
        raise Unsupported(f"the loss's settings {', '.join(sorted(unknown))} are not known")
    if merged["eps_hi"] in (None, "=eps"):
        merged["eps_hi"] = merged["eps"]
    merged["max_len"] = merged["max_len"] or golden.inputs["mask"].shape[-1]
    return merged


def trl_config(s: dict) -> GRPOConfig:
    if s["loss_type"] not in AGGREGATIONS or s["level"] not in ("token", "sequence"):
        raise Unsupported(f"loss_type={s['loss_type']!r} at level={s['level']!r} is not known")
    cispo, sequence = s["loss_type"] == "cispo", s["level"] == "sequence"
    if cispo and sequence:
        raise Unsupported("loss_type='cispo' has ratios of tokens only")
    clip = PolicyLossConfig(
        name="cispo" if cispo else "gspo" if sequence else "clip",
        eps_low=s["eps"],
        eps_high=s["eps_hi"],
        ratio_cap=s["delta"] or 0.0,
        cispo_max=s["eps_hi"],
    )
    return GRPOConfig(
        aggregation=AGGREGATIONS[s["loss_type"]],
        loss_length=s["max_len"],
        count_empty_rows=True,  # as this code does
        policy_loss=clip,
        kl=KLConfig(beta=s["beta"], is_correct=bool(s["bias_kl"])),
        weights=weight_config(s["egsw"], s["stop_gradient"]),
        correction=CorrectionConfig(top_entropy=s["top_q"] if s["top_q"] < 1 else 0.0),
    )


def trl_loss(s: dict, data: dict, logp, entropy, vocab: int = 0):
    """The loss, then weights and what metrics need; `data` holds the rest, all [Q, G] or [Q, G, N]."""
    config, mask, A = trl_config(s), data["mask"], data["advantages"]
    w = sequence_weights(config.weights, A, entropy, mask, vocab)
    factors = data["is_ratio"] if s["use_is"] else jnp.ones_like(logp)
    threshold = entropy_threshold(config.correction, entropy.astype(jnp.float32), mask)  # as this code does
    factors = factors * top_tokens(jax.lax.stop_gradient(entropy), mask, threshold)
    old_logp = None if s["on_policy"] else data["old_logps"]
    found = surrogate(config, logp, old_logp, A, mask, ref_logp=data["ref_logps"], weights=w, factors=factors)
    loss = divide(*loss_terms(config, found.total, mask, entropy=entropy, coefficient=s["ent_coef"]))
    return loss, (config, w, found)


def trl_metrics(s: dict, data: dict, logp, entropy, config: GRPOConfig, found) -> dict:
    """Means over scored tokens; clipped rows rather than tokens where the ratio is the sequence's."""
    mask, A = data["mask"], data["advantages"]
    old_logp = logp if s["on_policy"] else data["old_logps"]
    clipped = clip_statistics(config.policy_loss, logp, old_logp, A, mask)
    mean = (
        (lambda x: wide(x.any(-1)).mean()) if s["level"] == "sequence" else (lambda x: pooled_mean(x, mask))
    )
    parts = {f"clip_ratio/{n}_mean": mean(getattr(clipped, n)) for n in ("low", "high", "region")}
    return parts | {
        "kl": pooled_mean(found.kl, mask),
        "entropy": pooled_mean(entropy, mask),
        "cispo_clip_ratio": mean(clipped.high & (A[..., None] > 0)),
    }


@family(
    "GRPO losses",
    when=lambda g: {"in.logps", "in.old_logps", "in.entropy"} <= g.arrays.keys(),
    tolerance=lambda g, key: 1e-7 if ".metric." in key else 1e-9,  # some means were taken in float32
)
@compiled
def grpo(golden: Golden):
    G = int(golden.meta.get("shapes", {}).get("G", 1))
    data = {name: grouped(x, G) for name, x in golden.inputs.items() if x.ndim}
    data["mask"] = data["mask"].astype(bool)
    logp, entropy, values = data["logps"], data["entropy"], {}
    for name, settings in golden.meta["settings"].items():
        s = settings_of(golden, settings)

        def loss(logp, entropy, s=s):
            return trl_loss(s, data, logp, entropy)

        (value, rest), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(logp, entropy)
        config, _, found = rest
        values |= {f"out.{name}.loss": value, f"grad.{name}.logps": flat(gradients[0])}
        values[f"grad.{name}.entropy"] = flat(gradients[1])
        metrics = trl_metrics(s, data, logp, entropy, config, found)
        values |= {f"out.{name}.metric.{key}": x for key, x in metrics.items()}
    yield "rl.surrogate", values


@family(
    "EGSW losses",
    when=lambda g: {"in.logits", "in.old_logps", "in.advantages"} <= g.arrays.keys(),
    tolerance=lambda g, key: 1e-6 if key.startswith("grad") else 1e-8,
)
@compiled
def egsw(golden: Golden):
    given, G = golden.inputs, int(golden.inputs["group_size"])
    logits, ids = jnp.asarray(given["logits"]), jnp.asarray(given["ids"])
    names = ("mask", "advantages", "old_logps", "ref_logps")
    data = {name: grouped(given[name], G) for name in names if name in given}
    data["mask"] = data["mask"].astype(bool)
    vocab, every = logits.shape[-1], golden.meta["settings"]
    for implementation in IMPLEMENTATIONS:

        def said(x, implementation=implementation):
            return of_logits(x, ids, float(given["temperature"]), implementation)

        of_tokens, pullback = jax.vjp(said, logits)
        values, cotangents = {}, []
        for name, settings in every.items():
            s = settings_of(golden, settings)

            def loss(logp, entropy, s=s):
                return trl_loss(s, data, grouped(logp, G), grouped(entropy, G), vocab)

            (value, (_, w, _)), by_token = jax.value_and_grad(loss, (0, 1), has_aux=True)(*of_tokens)
            values |= {f"out.{name}.loss": value, f"out.{name}.weights": flat(w)}
            cotangents.append(by_token)
        (gradients,) = jax.vmap(pullback)(jax.tree.map(lambda *x: jnp.stack(x), *cotangents))
        values |= {f"grad.{name}.logits": x for name, x in zip(every, gradients, strict=True)}
        yield implementation, values


def verl_config(name: str, s: dict, rows: int, N: int) -> GRPOConfig:
    """`name`: of the setting, its first word the loss."""
    low, high = s.get("eps_low", 0.2), s.get("eps_high", 0.2)
    kind = name.partition(".")[0].partition("_")[0]
    if kind not in ("dualclip", "clip", "gspo", "cispo", "kl"):
        raise Unsupported(f"the loss {name!r} is not known")
    clip = PolicyLossConfig(
        name=kind if kind in ("gspo", "cispo") else "clip",
        eps_low=low,
        eps_high=high,
        ratio_cap=s.get("dual_clip_c") or 0.0,
        cispo_min=1 - low,
        cispo_max=1 + high,
    )
    aggregation = s.get("agg", "seq-mean-token-mean" if kind == "gspo" else "token-mean").replace("-", "_")
    length = 0.0
    if aggregation == "seq_mean_token_sum_norm":  # divided by a constant, not by the rows
        aggregation, length = "seq_sum_const", (s.get("norm_const") or N) / rows
    return GRPOConfig(aggregation=aggregation, loss_length=length, policy_loss=clip)


def verl_divergence(kind: str, logp, ref_logp, mask):
    """Each token's; this code keeps k3 within +-10."""
    kl = divergence(KLConfig(estimator=kind), logp, ref_logp, mask)
    return jnp.clip(kl, -10, 10) if kind == "k3" else kl


@family(
    "GRPO losses and divergences",
    when=lambda g: "in.logps" in g.arrays and "in.entropy" not in g.arrays,
    tolerance=1e-7,  # this code adds 1e-8 to the length
)
@compiled
def verl(golden: Golden):
    data = {name: jnp.asarray(x)[None] for name, x in golden.inputs.items() if x.ndim}
    mask, logp, old_logp, A = data["mask"].astype(bool), data["logps"], data["old_logps"], data["advantages"]
    rows, values = int(np.any(golden.inputs["mask"], -1).sum()), {}
    for name, s in golden.meta["settings"].items():
        config = verl_config(name, s, rows, mask.shape[-1])
        kind = name.partition(".")[2] if name.startswith("kl.") else None

        def loss(logp, config=config, kind=kind):
            if kind:
                parts = verl_divergence(kind, logp, data["ref_logps"], mask)
            else:
                parts = policy_loss(config.policy_loss, logp, old_logp, A, mask)
            return divide(*aggregate(config, parts, mask))

        value, gradient = jax.value_and_grad(loss)(logp)
        clipped = clip_statistics(config.policy_loss, logp, old_logp, A, mask)
        values |= {f"out.{name}.loss": value, f"grad.{name}.logps": gradient[0]}
        values[f"out.{name}.metric.pg_clipfrac"] = pooled_mean(clipped.region, mask)
        values[f"out.{name}.metric.pg_clipfrac_lower"] = pooled_mean(clipped.capped, mask)
        values[f"out.{name}.metric.ppo_kl"] = pooled_mean(old_logp - logp, mask)
        if kind:
            everywhere = jnp.ones_like(mask)
            values[f"out.{name}.per_token"] = verl_divergence(kind, logp, data["ref_logps"], everywhere)[0]
    yield "rl.policy_losses", values
