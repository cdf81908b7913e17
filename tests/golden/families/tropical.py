"""Tropical attention (arXiv 2505.17190): max-plus products, the core with masks, layers, scans along a sequence.

Files hold [B, H, T, D] arrays, arbitrary boolean masks, and layer weights under their published names, [out, in].
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.attention.tropical import (
    MHTAConfig,
    MultiHeadTropicalAttention,
    maxplus_matmul,
    mhta_params,
    tropical_attention,
    tropical_linear,
    tropical_scores,
)
from kernels.tropical import attention, linear, matmul, maxplus_linear_attention, maxplus_scan, scan
from kernels.tropical.attention import BlockSizes
from tests.golden.registry import Golden, Unsupported, family

SCORES = {
    "hilbert": "hilbert",
    "hilbertsym": "hilbert",
    "symmetric": "hilbert",
    "hilbertasym": "hilbert_asym",
    "asym": "hilbert_asym",
    "asymmetric": "hilbert_asym",
    "hilbertasymmetric": "hilbert_asym",
    "maxplusdot": "maxplus_dot",
    "maxplus": "maxplus_dot",
    "dot": "maxplus_dot",
    "lsedot": "lse_dot",
    "lse": "lse_dot",
    "logsumexp": "lse_dot",
}


def heads(x):
    """[B, H, T, ...] <-> [B, T, H, ...]."""
    return jnp.swapaxes(jnp.asarray(x), 1, 2)


def on_cpu(implementations):
    """Those that can run here by name."""
    return [each for each in implementations if "cpu" in each.platforms]


def setting(golden: Golden, *names: str, default):
    """The first of these names in the settings of the file."""
    known = golden.meta | golden.meta.get("settings", {})
    return next((known[name] for name in names if name in known), default)


def flag(golden: Golden, *names: str, default: bool) -> bool:
    value = str(setting(golden, *names, default=default)).lower()
    if value not in ("true", "false", "1", "0"):
        raise Unsupported(f"{names[0]}={value!r} is neither true nor false")
    return value in ("true", "1")


def score_of(golden: Golden) -> str:
    if not flag(golden, "use_tropical_metric", default=True):
        default = "lse_dot" if flag(golden, "use_logsumexp", default=False) else "maxplus_dot"
    else:
        default = "hilbert" if flag(golden, "symmetric", "sym", default=True) else "hilbert_asym"
    value = str(setting(golden, "score", "score_type", "metric", default=default))
    score = SCORES.get(value.lower().replace("_", "").replace("-", ""))
    if score is None:
        raise Unsupported(f"score {value!r} is not known")
    return score


@family(
    "max-plus product", when=lambda g: {"in.a", "in.b", "out.c"} <= g.arrays.keys() and "in.q" not in g.arrays
)
def product(golden: Golden):
    a, b, cotangent = (
        jnp.asarray(x) for x in (golden.inputs["a"], golden.inputs["b"], golden.cotangents["c"])
    )
    for each in on_cpu(matmul.IMPLEMENTATIONS):

        @jax.jit
        def run(a, b, cotangent, name=each.name):
            c, pull, winners = jax.vjp(
                lambda a, b: maxplus_matmul(a, b, return_winners=True, implementation=name),
                a,
                b,
                has_aux=True,
            )
            # The official gradient, split evenly over ties, is that of a plain maximum and not of our operation.
            _, even = jax.vjp(lambda a, b: jnp.max(a[..., :, :, None] + b[..., None, :, :], axis=-2), a, b)
            values = {"out.c": c, "out.argmax": winners, "out.loss": jnp.sum(c * cotangent)[None]}
            for prefix, gradients in (("grad_first", pull(cotangent)), ("grad", even(cotangent))):
                values |= {f"{prefix}.a": gradients[0], f"{prefix}.b": gradients[1]}
            return values

        yield each.name, run(a, b, cotangent)


@family(
    "tropical linear map",
    when=lambda g: g.params.keys() == {"W"} and "in.x" in g.arrays and "cot.y" in g.arrays,
)
def linear_map(golden: Golden):
    for each in on_cpu(matmul.IMPLEMENTATIONS):

        @jax.jit
        def run(x, w, cotangent, name=each.name):
            y, pull = jax.vjp(lambda x, w: tropical_linear(x, w, implementation=name), x, w)
            dx, dw = pull(cotangent)
            return {"out.y": y, "out.loss": jnp.sum(y * cotangent)[None], "grad.x": dx, "grad.W": dw}

        yield each.name, run(golden.inputs["x"], golden.params["W"], golden.cotangents["y"])


@family("tropical core", when=lambda g: {"in.q", "in.k", "in.v", "out.context", "cot.o"} <= g.arrays.keys())
def core(golden: Golden):
    x, score = golden.inputs, score_of(golden)
    scale = float(setting(golden, "score_scale", "scale", default=1.0))
    operands = {name: heads(x[name]) for name in "qkv"}
    T, S = x["q"].shape[2], x["k"].shape[2]
    seen = x.get("mask")
    if seen is None and "causal" in str(setting(golden, "kind", default="full")):
        seen = (jnp.arange(S) <= jnp.arange(T)[:, None] + S - T)[None, None]
    bias = jnp.zeros((1, 1, 1, 1)) if seen is None else jnp.where(jnp.asarray(seen, bool), 0.0, -jnp.inf)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if "bias" in x:
        bias = bias + jnp.asarray(x["bias"])
    hard = score != "lse_dot"
    for each in on_cpu(attention.IMPLEMENTATIONS):

        @jax.jit
        def run(operands, bias, cotangent, name=each.name):
            def attend(operands):
                o, c, *winners = tropical_attention(
                    **operands, score=score, bias=bias, score_scale=scale, return_context=True, return_winners=hard,
                    implementation=name, block_sizes=BlockSizes(4, 5),
                )  # fmt: skip
                return o, (c, winners)

            o, pull, (c, winners) = jax.vjp(attend, operands, has_aux=True)
            gradients = pull(heads(cotangent))[0]
            raw = tropical_scores(operands["q"], operands["k"], score=score, score_scale=scale)
            values = {"out.scores": raw, "out.context": heads(c), "out.o": heads(o)}
            values |= {"out.argmax": heads(winners[0])} if hard else {}
            values["out.loss"] = jnp.sum(values["out.o"] * cotangent)[None]
            return values | {f"grad.{n}": heads(gradient) for n, gradient in gradients.items()}

        yield each.name, run(operands, bias, golden.cotangents["o"])


def is_layer(golden: Golden) -> bool:
    arrays = golden.arrays.keys()
    tropical = "lambda_param" in golden.params or "query_trop.W" in golden.params or "out.scores" in arrays
    return (
        {"in.x", "out.y", "param.out.weight"} <= arrays
        and tropical
        and "input_linear.weight" not in golden.params
    )


@family("tropical attention layer", when=is_layer)
def layer(golden: Golden):
    config, x = layer_config(golden), golden.inputs["x"]
    count = setting(golden, "n_heads", "num_heads", "heads", "H", default=None)
    count = int(count or golden.arrays["out.scores"].shape[0] // x.shape[0])
    for each in on_cpu(attention.IMPLEMENTATIONS):
        chosen = dataclasses.replace(config, implementation=each.name)
        module = MultiHeadTropicalAttention(chosen, x.shape[-1], count, jnp.float64, jnp.float64)

        def loss(params, x, module=module):
            y, s = module.apply({"params": mhta_params(params)}, x, return_scores=True)
            results = {"y": y, "scores": s.reshape(-1, *s.shape[2:])}
            total = sum(jnp.sum(results[name] * cotangent) for name, cotangent in golden.cotangents.items())
            return total, results

        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (total, results), (of_params, of_x) = compute(golden.params, x)
        values = {f"out.{name}": value for name, value in results.items()} | {"out.loss": total[None]}
        yield each.name, values | {f"grad.{name}": g for name, g in of_params.items()} | {"grad.x": of_x}


def layer_config(golden: Golden) -> MHTAConfig:
    """Which maps and thresholds there are shows in the weights; the rest is in the settings."""
    maps = golden.params.get("query_trop.W")
    return MHTAConfig(
        qkv_linear="query_linear.weight" in golden.params,
        tropical_proj=maps is not None,
        per_head_trop=maps is not None and maps.ndim == 3,
        gauge=str(setting(golden, "gauge", default="lambda" if "lambda_param" in golden.params else "none")),
        score=score_of(golden),
        score_scale=float(setting(golden, "score_scale", default=1.0)),
        valuation=str(setting(golden, "valuation", default="log1p")),
        devaluation=str(setting(golden, "devaluation", default="expm1")),
    )


@family("max-plus scan", when=lambda g: {"in.a", "in.b", "out.h"} <= g.arrays.keys())
def scanned(golden: Golden):
    x = golden.inputs
    for each in on_cpu(scan.IMPLEMENTATIONS):

        @jax.jit
        def run(a, b, h0, cotangent, name=each.name):
            h, pull, won = jax.vjp(
                lambda a, b, h0: maxplus_scan(a, b, h0, return_carry_wins=True, implementation=name),
                heads(a), heads(b), h0, has_aux=True,
            )  # fmt: skip
            da, db, dh0 = pull(heads(cotangent))
            total = jnp.sum(jnp.where(cotangent == 0, 0, heads(h) * cotangent))[None]
            values = {"out.h": heads(h), "out.carry_wins": heads(won), "out.loss": total}
            return values | {"grad.a": heads(da), "grad.b": heads(db), "grad.h0": dh0}

        h0 = x.get("h0", jnp.full((*x["a"].shape[:2], *x["a"].shape[3:]), -jnp.inf))
        yield each.name, run(x["a"], x["b"], h0, golden.cotangents["h"])


@family("max-plus linear attention", when=lambda g: {"in.q", "in.k", "in.v", "out.c"} <= g.arrays.keys())
def linear_attention(golden: Golden):
    x, cotangents = golden.inputs, golden.cotangents
    operands = {name: heads(x[name]) for name in ("q", "k", "v", "a") if name in x}
    state = next((jnp.asarray(x[name]) for name in ("state", "state0", "m0", "M0") if name in x), None)
    for each in on_cpu(linear.IMPLEMENTATIONS):

        @jax.jit
        def run(operands, name=each.name):
            def attend(operands):
                q, k, v, a = (operands.get(n) for n in ("q", "k", "v", "a"))
                c, last, winners = maxplus_linear_attention(
                    q,
                    k,
                    v,
                    a,
                    initial_state=state,
                    return_state=True,
                    return_winners=True,
                    implementation=name,
                )
                return (heads(c), last), winners

            (c, last), pull, winners = jax.vjp(attend, operands, has_aux=True)
            of_state = jnp.asarray(cotangents["state"]) if "state" in cotangents else jnp.zeros_like(last)
            gradients = pull((jnp.asarray(cotangents["c"]), of_state))[0]
            values = {"out.c": c, "out.state": last, "out.argmax": heads(winners)}
            values["out.loss"] = jnp.sum(c * cotangents["c"])[None]
            return values | {f"grad.{n}": heads(gradient) for n, gradient in gradients.items()}

        yield each.name, run(operands)
