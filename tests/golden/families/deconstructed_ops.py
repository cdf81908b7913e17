"""Golden files of Deconstructing Attention (arXiv 2510.11602): prefix softmax, the further controls, the indicators.

A file holds cases, in.<case>.<name>; which mechanism a case is follows from the names and axes of its inputs.
"""

import re

import jax
import jax.numpy as jnp

from attnlab.attention.controls import aft_simple, uniform_attention
from attnlab.attention.indicators import (
    concentration,
    concentration_norm,
    entropy,
    entropy_norm,
    head_diversity,
    local_focus,
    sink,
)
from attnlab.attention.position_mixing import channel_transform, fourier_mixing, mixit_map, token_mlp
from attnlab.attention.synthesizer import (
    synth_dense,
    synth_dense_fact,
    synth_mix,
    synth_random,
    synth_random_fact,
)
from kernels.masks import Mask
from kernels.prefix_softmax import prefix_softmax
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("reference", "blockwise")


def cases(golden: Golden) -> dict[str, dict]:
    """Inputs by case and name; {} if some input belongs to no case."""
    found: dict[str, dict] = {}
    for key, x in golden.inputs.items():
        case, dot, name = key.rpartition(".")
        if not dot:
            return {}
        found.setdefault(case, {})[name] = x
    return found


def setting(golden: Golden, case: str, default, *names: str):
    """meta[name], or meta[case][name], or one of meta's tables of sizes; the default if no name is there."""
    places = [
        golden.meta.get(case),
        golden.meta,
        *(golden.meta.get(k) for k in ("cfg", "config", "shape", "shapes")),
    ]
    for place in places:
        for name in names:
            if isinstance(place, dict) and place.get(name) is not None:
                return place[name]
    return default


def gradients(golden: Golden, case: str, call, inputs: dict) -> dict:
    """out.<case> and grad.<case>.* of sum(out * cot) for a function of the float inputs by name."""
    wanted = [n for n in inputs if f"grad.{case}.{n}" in golden.arrays]
    rest = {n: x for n, x in inputs.items() if n not in wanted}
    out, pull = jax.vjp(lambda x: call(**x, **rest), {n: jnp.asarray(inputs[n]) for n in wanted})
    values = {f"out.{case}": out}
    if wanted:
        cotangent = jnp.asarray(golden.arrays[f"cot.{case}"], out.dtype)
        values |= {f"grad.{case}.{n}": x for n, x in pull(cotangent)[0].items()}
    return values


# --- prefix softmax ----------------------------------------------------------------------------------------


def is_prefix(golden: Golden) -> bool:
    found = cases(golden)
    named = "non-approximate" in str(golden.meta.get("op", "")).lower()
    return bool(found) and all(
        {"q", "k", "v"} <= set(x) and (named or "prefix_lengths" in x) for x in found.values()
    )


@family("prefix softmax", when=is_prefix, tolerance=1e-10)
def prefix(golden: Golden):
    """q after SiLU; logits s_j = <q_j, k_j> scale; also the decode state after some prefixes."""

    def compute(implementation):
        values = {}
        for case, inputs in cases(golden).items():
            scale = number(setting(golden, case, "D^-0.5", "nonapprox_scale", "scale"), inputs["q"].shape[-1])
            softcap = setting(golden, case, 0.0, "logit_softcap", "softcap") or 0.0
            causal = bool(setting(golden, case, True, "causal"))

            def logits(q, k, scale=scale, softcap=softcap):
                s = scale * jnp.sum(q * jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), axis=-1)
                return softcap * jnp.tanh(s / softcap) if softcap else s

            def call(q, k, v, logits=logits, causal=causal):
                return prefix_softmax(
                    logits(q, k), v, mask=Mask(causal=causal), implementation=implementation
                )

            q, k, v = (jnp.asarray(inputs[n]) for n in "qkv")
            values |= gradients(golden, case, call, {"q": q, "k": k, "v": v})
            if f"out.{case}.lse" in golden.arrays:
                options = {"mask": Mask(causal=causal), "return_lse": True, "implementation": implementation}
                lse = prefix_softmax(logits(q, k), v, **options)[1]
                axes = golden.arrays[f"out.{case}.lse"].shape
                values[f"out.{case}.lse"] = lse if axes == lse.shape else lse.swapaxes(1, 2)
            states = []
            for length in map(int, inputs.get("prefix_lengths", ())):
                s = logits(q[:, :length], k[:, :length])
                states.append(
                    prefix_softmax(s, v[:, :length], return_state=True, implementation=implementation)[1]
                )
            if states:
                values |= {f"out.{case}.state_{n}": jnp.stack([getattr(x, n) for x in states]) for n in "mzn"}
        return values

    for name in IMPLEMENTATIONS:
        yield name, jax.jit(lambda name=name: compute(name))()


def number(value, D: int) -> float:
    """A scale, given as a number or as "D^-0.5", "1/sqrt(D)" or "1"."""
    if isinstance(value, str):
        text = re.sub(r"[\s()*]", "", value.lower())
        if re.fullmatch(r"(d|dh|d_h|head_dim)\^?-(0?\.5|1/2)|1/sqrt(d|dh|d_h|head_dim)", text):
            return D**-0.5
        try:
            return float(text)
        except ValueError as error:
            raise Unsupported(f"scale {value!r} is not understood; give a number or D^-0.5") from error
    return float(value)


# --- controls ----------------------------------------------------------------------------------------------


def control(golden: Golden, case: str, inputs: dict):
    """name of the mechanism, or None if the inputs are none of a control."""
    by_names = {
        ("R_", "v"): "synth_random",
        ("R1", "R2", "v"): "synth_random_fact",
        ("a", "b2", "v", "w2"): "synth_dense",
        ("A", "Bm", "v"): "synth_dense_fact",
        ("R_", "alpha", "k", "q", "v"): "synth_mix",
        ("W", "b", "v"): "token_mlp",
        ("W", "b", "u", "v"): "token_mlp_gated",
        ("A", "noise", "v"): "mixit",
        ("A", "v"): "mixit",
        ("noise",): "mixit",
        ("v",): "uniform",
        ("x",): "fnet",
    }
    names = tuple(sorted(inputs))
    if names == ("k", "q", "v") and inputs["q"].ndim == 3:
        return "aft_simple"
    found = by_names.get(names)
    if found == "fnet" and not (case.startswith("fnet") and inputs["x"].ndim == 3):
        return None
    if found == "mixit" and ("A" in inputs and inputs["A"].ndim != 3):
        return None
    return found


def is_controls(golden: Golden) -> bool:
    found = cases(golden)
    return bool(found) and not golden.params and all(control(golden, case, x) for case, x in found.items())


@family("controls", when=is_controls, tolerance=1e-10)
def controls(golden: Golden):
    """Mixers alone, without projections."""

    def compute(implementation):
        values = {}
        for case, inputs in cases(golden).items():
            mechanism = control(golden, case, inputs)
            if mechanism == "fnet":
                values |= fourier(golden, case, inputs, implementation)
            elif mechanism == "mixit":
                values |= noise_map(golden, case, inputs, implementation)
            else:
                values |= gradients(golden, case, CALLS[mechanism](golden, case, implementation), inputs)
        return values

    for name in IMPLEMENTATIONS:
        yield name, jax.jit(lambda name=name: compute(name))()


def options(golden: Golden, case: str, implementation: str) -> dict:
    return {
        "mask": Mask(causal=bool(setting(golden, case, True, "causal"))),
        "implementation": implementation,
    }


CALLS = {
    "uniform": lambda *a: lambda v: uniform_attention(v, **options(*a)),
    "synth_random": lambda *a: lambda R_, v: synth_random(R_, v, **options(*a)),
    "synth_random_fact": lambda *a: lambda R1, R2, v: synth_random_fact(R1, R2, v, **options(*a)),
    "synth_dense": lambda *args: lambda a, w2, b2, v: synth_dense(a, w2, b2, v, **options(*args)),
    "synth_dense_fact": lambda *a: lambda A, Bm, v: synth_dense_fact(A, Bm, v, **options(*a)),
    "synth_mix": lambda *a: lambda q, k, R_, alpha, v: synth_mix(q, k, R_, alpha, v, **options(*a)),
    "token_mlp": lambda *a: lambda W, b, v: token_mlp(W, b, v, **options(*a)),
    "token_mlp_gated": lambda *a: lambda W, b, u, v: u * token_mlp(W, b, v, **options(*a)),
    "aft_simple": lambda *a: lambda q, k, v: aft_simple(q, k, v, **options(*a)),
}


def fourier(golden: Golden, case: str, inputs: dict, implementation: str) -> dict:
    """Case fnet_t, fnet_N (the row factor) or fnet_noncausal; also out.fnet_noncausal of the causal cases' x."""
    lengths = {x.shape[1] for n, x in golden.inputs.items() if n.endswith((".R_", ".W", ".noise", ".R1"))}
    period = setting(golden, case, max(lengths, default=0), "N", "max_len", "max_length", "table_length")
    row = setting(
        golden, case, "N" if case.lower().removeprefix("fnet_").startswith(("n", "N")) else "t", "row"
    )
    row = "N" if str(row) in ("N", "n") else "t" if str(row) == "t" else row
    whole = {"mask": Mask(causal=False), "row": "N", "implementation": implementation}
    if row not in ("t", "N"):
        raise Unsupported(f"the row factor {row!r} of {case} is unknown; use 't' or 'N'")

    def noncausal(x):
        return fourier_mixing(channel_transform(x), period=x.shape[1], **whole)

    def causal(x):
        return fourier_mixing(
            channel_transform(x), period=int(period), row=row, implementation=implementation
        )

    if "noncausal" in case:
        return gradients(golden, case, noncausal, inputs)
    if not period:
        raise Unsupported(f"the period N of {case} is in no setting; give meta['shape']['N']")
    values = gradients(golden, case, causal, inputs)
    if "out.fnet_noncausal" in golden.arrays and "in.fnet_noncausal.x" not in golden.arrays:
        values["out.fnet_noncausal"] = noncausal(jnp.asarray(inputs["x"]))
    return values


def noise_map(golden: Golden, case: str, inputs: dict, implementation: str) -> dict:
    """out.<case>.A of the noise, out.<case> and gradients of the map A that is given."""
    values, A = {}, inputs.get("A")
    if "noise" in inputs:
        made = mixit_map(
            jnp.asarray(inputs["noise"]),
            scale=float(setting(golden, case, 1.0, "mix_scale", "c")),
            add_identity=bool(setting(golden, case, True, "add_identity")),
            sink_head0=bool(setting(golden, case, False, "sink_head0")),
        )
        values[f"out.{case}.A"], A = made, made if A is None else A
    if "v" in inputs:
        mask = options(golden, case, implementation)
        given = {"A": A, "v": inputs["v"]}
        values |= gradients(golden, case, lambda A, v: token_mlp(A, None, v, **mask), given)
    return values


# --- indicators --------------------------------------------------------------------------------------------


def is_indicators(golden: Golden) -> bool:
    inputs = golden.inputs
    names = {n.rpartition(".")[2] for n in inputs}
    return names == {"A"} and any(n.rpartition(".")[2] == "entropy" for n in golden.expected("out."))


@family("attention-map indicators", when=is_indicators, tolerance=1e-12)
def indicator_values(golden: Golden):
    """in.A or in.<case>.A; out.<case>.<indicator>."""
    simple = {
        "entropy": entropy,
        "entropy_norm": entropy_norm,
        "conc": concentration,
        "conc_norm": concentration_norm,
        "sink": sink,
    }
    values = {}
    for key in golden.expected("out."):
        case, dot, name = key.rpartition(".")
        A = jnp.asarray(golden.inputs[f"{case}{dot}A"])
        if name in simple:
            values[f"out.{key}"] = simple[name](A)
        elif name == "headdiv":
            values[f"out.{key}"] = head_diversity(A, ddof=int(setting(golden, case, 0, "ddof")))
        elif match := re.fullmatch(r"locfoc_?(\d+)", name):
            values[f"out.{key}"] = local_focus(A, int(match[1]))
        else:
            raise Unsupported(f"the indicator {name!r} is unknown")
    yield "indicators", values
