"""EGSW and GRPO up to the loss: log-probabilities and entropies, advantages, sequence weights, rollouts, sampling.

Published rows are flat and group-major, B = Q G; here groups have an axis of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.models.decoding import filter_logits
from attnlab.rl.advantages import advantages
from attnlab.rl.completions import finish, keep_groups, overlong_penalty
from attnlab.rl.config import AdvantageConfig, SequenceWeightConfig
from attnlab.rl.sequence_weights import sequence_weights
from kernels.log_prob import token_log_probs
from tests.golden.registry import Compute, Golden, Unsupported, family

IMPLEMENTATIONS = ("blockwise", "reference")
RULES = {
    "trl_group": AdvantageConfig(name="group", eps=1e-4),
    "trl_batch": AdvantageConfig(name="batch", eps=1e-4),
    "trl_none": AdvantageConfig(name="none"),
    "verl_grpo": AdvantageConfig(name="group", eps=1e-6),
    "verl_dr_grpo": AdvantageConfig(name="none"),
    "verl_rloo": AdvantageConfig(name="rloo"),
}
OF_SEVERAL = {
    "sum_then_normalize": AdvantageConfig(name="group", eps=1e-4),
    "normalize_then_sum": AdvantageConfig(name="per_reward", eps=1e-4),
}
WEIGHT_FIELDS = {
    "mode": "mode", "alpha": "alpha", "P": "temperature", "scale": "scale", "agg": "entropy_agg",
    "hnorm": "entropy_norm", "stop_gradient": "stop_gradient", "step_members": "step_members",
}  # fmt: skip


def grouped(x, G: int) -> jax.Array:
    """[B, ...] as [Q, G, ...]."""
    return jnp.asarray(x).reshape(-1, G, *np.shape(x)[1:])


def flat(x) -> jax.Array:
    """[Q, G, ...] as [B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def compiled(compute: Compute) -> Compute:
    """Decorator: everything that a family computes of a file as one program, far faster than step by step."""

    def run(golden: Golden):
        yield from jax.jit(lambda: dict(compute(golden)))().items()

    return run


def of_logits(logits, ids, temperature: float, implementation: str):
    """logp and entropy [B, T] of logits [B, T, V]: the head is the identity."""
    said = token_log_probs(
        logits, jnp.eye(logits.shape[-1], dtype=logits.dtype), ids, temperature=temperature,
        implementation=implementation,
    )  # fmt: skip
    return said.logp, said.entropy


@family("token log-probabilities", when=lambda g: {"in.logits", "in.ids", "cot.logps"} <= g.arrays.keys())
@compiled
def log_probs(golden: Golden):
    logits, ids = jnp.asarray(golden.inputs["logits"]), jnp.asarray(golden.inputs["ids"])
    temperature = float(golden.inputs.get("temperature", 1.0))
    for implementation in IMPLEMENTATIONS:

        def outputs(x, implementation=implementation):
            return of_logits(x, ids, temperature, implementation)

        (logp, entropy), pullback = jax.vjp(outputs, logits)
        cot, zero = golden.cotangents, jnp.zeros_like(logp)
        yield (
            implementation,
            {
                "out.logps": logp,
                "out.entropy": entropy,
                "grad.logits.logps": pullback((jnp.asarray(cot["logps"]), zero))[0],
                "grad.logits.entropy": pullback((zero, jnp.asarray(cot["entropy"])))[0],
            },
        )


@family("advantages", when=lambda g: any(key.startswith("in.rewards_") for key in g.arrays))
@compiled
def of_rewards(golden: Golden):
    given, G, values = golden.inputs, int(golden.inputs["group_size"]), {}
    for name, rewards in golden.expected("in.rewards_").items():
        if name == "per_func":
            continue
        rewards = grouped(rewards, G)[..., None]
        for rule, config in RULES.items():
            A, info = advantages(config, rewards, jnp.ones(1))
            values[f"out.{name}.{rule}"] = flat(A)
        values[f"out.{name}.is_std_zero"] = jnp.repeat(info.zero_std, G)
    if "rewards_per_func" in given:
        for rule, config in OF_SEVERAL.items():
            rewards = grouped(given["rewards_per_func"], G)
            values[f"out.multi.{rule}"] = flat(advantages(config, rewards, given["reward_weights"])[0])
    yield "rl.advantages", values


def weight_config(settings: dict | None, stop_gradient: bool = True) -> SequenceWeightConfig:
    """Of published settings; without any, plain GRPO."""
    if settings is None:
        return SequenceWeightConfig(name="none")
    unknown = settings.keys() - WEIGHT_FIELDS.keys()
    if unknown:
        raise Unsupported(f"the weights' settings {', '.join(sorted(unknown))} are not known")
    fields = {WEIGHT_FIELDS[name]: value for name, value in settings.items() if value is not None}
    config = SequenceWeightConfig(name="egsw", **({"stop_gradient": stop_gradient} | fields))
    dataclasses.replace(config, entropy_source="current").validate()
    return config


@family("EGSW weights", when=lambda g: {"in.entropy", "in.vocab"} <= g.arrays.keys())
@compiled
def weights(golden: Golden):
    given, G = golden.inputs, int(golden.inputs["group_size"])
    A, H, mask = (grouped(given[n], G) for n in ("advantages", "entropy", "mask"))
    values = {}
    for name, settings in golden.meta["settings"].items():
        config = weight_config(settings)
        w = sequence_weights(config, A, H, mask.astype(bool), int(given["vocab"]))
        values[f"out.{name}.weights"] = flat(w)
    yield "rl.sequence_weights", values


@family("completions", when=lambda g: {"in.ids", "in.eos", "in.pad"} <= g.arrays.keys())
@compiled
def postprocessing(golden: Golden):
    given = golden.inputs
    found = finish(jnp.asarray(given["ids"]), np.atleast_1d(given["eos"]).tolist(), int(given["pad"]))
    values = {
        "out.ids_clean": found.ids,
        "out.mask": found.mask,
        "out.lengths": found.lengths,
        "out.truncated": found.truncated,
    }
    if "overlong_lengths" in given:
        lengths = jnp.asarray(given["overlong_lengths"])
        values["out.overlong_penalty"] = overlong_penalty(lengths, int(given["L_max"]), int(given["L_cache"]))
    if "group_rewards" in given:
        values["out.dynamic_keep"] = keep_groups(grouped(given["group_rewards"], int(given["group_size"])))
    yield "rl.completions", values


@family(
    "sampling filters",
    when=lambda g: "in.logits" in g.arrays and any(key.endswith(".keep") for key in g.arrays),
)
@compiled
def sampling_filters(golden: Golden):
    """Rows with equal logits count only without top_k and top_p, whose ties the sources break each in their own way."""
    logits = jnp.asarray(golden.inputs["logits"])
    tied = np.array([np.unique(row).size < row.size for row in golden.inputs["logits"]])[:, None]
    values = {}
    for name, settings in golden.meta["settings"].items():
        filtered = filter_logits(logits, **settings)
        keep = jnp.isfinite(filtered)
        found = {"keep": keep, "logprobs": jnp.where(keep, jax.nn.log_softmax(filtered), -1e30)}
        skip = tied & bool(settings.keys() & {"top_k", "top_p"})
        for key, x in found.items():
            values[f"out.{name}.{key}"] = jnp.where(skip, golden.arrays[f"out.{name}.{key}"], x)
    yield "models.decoding", values
