"""cosFormer (arXiv 2202.08791): the operator with and without a denominator, and three published layers.

Files of the operator hold q, k before activation and v, as [B, T, H, D]; those of layers hold (T, B, E) or (B, T, E)
inputs and weights stored (out, in). Loss: sum(out * cot.out).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.cosformer import (
    ACTIVATIONS,
    CosformerConfig,
    cosformer_attention,
    reweighting_angle,
)
from attnlab.attention.cosformer_cross import CrossCosformerAttention
from attnlab.attention.cosformer_states import absolute_state
from kernels.masks import Mask
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("reference", "blockwise")
ACTS = {
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "leakyrelu": "leaky_relu",
    "leaky": "leaky_relu",
    "lrelu": "leaky_relu",
    "leaky_relu(0.01)": "leaky_relu",
    "leakyrelu(0.01)": "leaky_relu",
    "elu": "elu",
    "identity": "identity",
    "linear": "identity",
    "none": "identity",
} | dict.fromkeys(
    ("elu1", "elu+1", "1+elu", "elu_1", "elu_plus_1", "1+elu(x)", "elu(x)+1", "one_plus_elu"), "elu1"
)
DENOMINATORS = {
    "clamp": "clamp",
    "clamp_min": "clamp",
    "max": "clamp",
    "add": "add",
    "added": "add",
    "plus": "add",
}


def is_operator(golden: Golden) -> bool:
    meta, settings = golden.meta, {"eps_mode", "act", "cos_reweight", "positions", "angle_scale"}
    return set(golden.inputs) >= {"q", "k", "v"} and not golden.params and bool(
        settings & set(meta) and {"M", "cos_reweight"} & set(meta)
    )  # fmt: skip


@family("cosFormer operator", when=is_operator)
def operator(golden: Golden):
    x = golden.inputs
    _refuse(set(x) - {"q", "k", "v", "allowed", "key_mask", "lengths", "segments"}, "inputs")
    options, extras = _options(golden.meta), {}
    lengths = _lengths(golden, x["q"].shape[1], x["k"].shape[1])
    masks = {name: _mask(golden, dense=name == "reference") for name in IMPLEMENTATIONS}
    cot = golden.cotangents

    def run(implementation, q, k, v):
        mask, allowed, key_mask = masks[implementation]

        def attend(q, k, v):
            return cosformer_attention(
                q, k, v, mask=mask, allowed=allowed, key_mask=key_mask, **options, **lengths,
                return_denominator=True, implementation=implementation,
            )  # fmt: skip

        (o, den), pull = jax.vjp(attend, q, k, v)
        grads = pull((cot.get("out", np.zeros(o.shape)), cot.get("den", np.zeros(den.shape))))
        values = {"out.out": o, "out.den": den}
        return values | {f"grad.{n}": g for n, g in zip("qkv", grads, strict=True)}

    if any(name.startswith(("out.state", "out.z_")) for name in golden.results):
        extras = _states(golden, options, lengths)
    for implementation in IMPLEMENTATIONS:
        if masks[implementation] is not None:
            yield implementation, jax.jit(partial(run, implementation))(x["q"], x["k"], x["v"]) | extras


def _states(golden: Golden, options: dict, lengths: dict):
    """Sums over all keys in the absolute frame; positions from 1 unless the file says otherwise."""
    x, first = golden.inputs, 0 if str(golden.meta.get("positions", "1..len")).startswith("0") else 1
    M = lengths.get("max_length") or max(x["q"].shape[1], x["k"].shape[1])
    if {"allowed", "key_mask", "lengths", "segments"} & set(x):
        raise Unsupported("states of masked keys are not described")
    fk = ACTIVATIONS[options["act"]](jnp.asarray(x["k"]))
    positions = jnp.arange(first, first + fk.shape[1])[None]
    state = absolute_state(fk, jnp.asarray(x["v"]), reweighting_angle(M, options["angle_scale"]), positions)
    parts = {"sin": state.sin, "cos": state.cos}
    values = {f"out.state_{name}": part[..., :-1] for name, part in parts.items()}
    return values | {f"out.z_{name}": part[..., -1] for name, part in parts.items()}


@family(
    "cosFormer layer",
    when=lambda g: (
        "query" in g.inputs
        and {"q_proj.weight", "k_proj.weight", "v_proj.weight"} <= set(g.params)
        and "eps_mode" in g.meta
    ),
)
def layer(golden: Golden):
    meta, x = golden.meta, golden.inputs
    _refuse(set(x) - {"query", "key", "value", "key_mask", "lengths"}, "inputs")
    T, S = x["query"].shape[0], x.get("key", x["query"]).shape[0]
    config = _config(meta, bias="q_proj.bias" in golden.params, out="out_proj.weight" in golden.params)
    config = dataclasses.replace(config, **_lengths(golden, T, S))
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}

    def forward(module, inputs, params):
        inputs = {name: a.swapaxes(0, 1) for name, a in inputs.items()}
        inputs.setdefault("value", inputs["query"])  # the published layer does so even where a key is given
        keys = _key_mask(golden, S)
        return module.apply(_tree(names, params), **inputs, key_mask=keys).swapaxes(0, 1)

    arrays = {name: a for name, a in x.items() if name in ("query", "key", "value")}
    yield from _layer(golden, config, bool(meta.get("causal", False)), arrays, forward)


@family(
    "cosFormer layer with a length a row",
    when=lambda g: "x" in g.inputs and "w_qkv.weight" in g.params and "eps_mode" in g.meta,
)
def layer_per_row(golden: Golden):
    meta, x = golden.meta, golden.inputs
    _refuse(set(x) - {"x", "lengths", "key_mask"}, "inputs")
    T, E = x["x"].shape[1:]
    # This layer's "elu" is 1 + elu, as its own documentation says.
    meta = meta | {"act": "elu1"} if _act(meta) == "elu" else meta
    config = _config(meta, bias="w_qkv.bias" in golden.params, out=True)
    per_row = "sample" in str(meta.get("M", "per sample")) or isinstance(meta.get("M"), list)
    lengths = {"m_mode": "per_sequence"} if per_row else _lengths(golden, T, T)
    config = dataclasses.replace(config, **lengths)

    def forward(module, inputs, params):
        split = {"w_o.weight": params["w_o.weight"]}
        if "w_o.bias" in params:
            split["w_o.bias"] = params["w_o.bias"]
        for kind in ("weight", "bias"):
            if f"w_qkv.{kind}" in params:
                parts = jnp.split(params[f"w_qkv.{kind}"], 3)
                split |= {f"{n}.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        names = {"q": "query", "k": "key", "v": "value", "w_o": "out"}
        return module.apply(_tree(names, split), inputs["x"], key_mask=_key_mask(golden, T))

    yield from _layer(golden, config, bool(meta.get("causal", False)), {"x": x["x"]}, forward)


def _layer(golden: Golden, config: CosformerConfig, causal: bool, arrays: dict, forward):
    """Output and gradients of inputs and parameters, once an implementation."""
    params, hidden = golden.params, golden.arrays["out.out"].shape[-1]
    for implementation in IMPLEMENTATIONS:
        options = dataclasses.replace(config, implementation=implementation).resolve(0, 0, 0, hidden)
        module = CrossCosformerAttention(
            config=options, hidden_size=hidden, dtype=jnp.float64, param_dtype=jnp.float64, causal=causal
        )

        def run(arrays, params, module=module):
            out, pull = jax.vjp(partial(forward, module), arrays, params)
            of_arrays, of_params = pull(golden.cotangents["out"])
            return {"out.out": out} | {f"grad.{n}": g for n, g in (of_arrays | of_params).items()}

        yield implementation, jax.jit(run)(arrays, params)


def _tree(names: dict, params: dict) -> dict:
    """Flax parameters of weights stored (out, in)."""
    tree: dict = {}
    for name, a in params.items():
        module, kind = name.rsplit(".", 1)
        if module not in names:
            raise Unsupported(f"the parameter {name!r} is unknown")
        tree.setdefault(names[module], {})["kernel" if kind == "weight" else "bias"] = a.T
    return {"params": tree}


def _act(meta: dict) -> str:
    text = str(meta.get("act", "relu")).lower().replace(" ", "").replace("-", "_")
    if text not in ACTS:
        raise Unsupported(f"the activation {meta['act']!r} is unknown")
    return ACTS[text]


def _angle_scale(meta: dict) -> float:
    on = meta.get("use_cos", meta.get("cos_reweight", True))
    return float(meta.get("angle_scale", 1.0)) if on else 0.0


def _options(meta: dict) -> dict:
    """Options of `cosformer_attention`, but for M."""
    options = {"act": _act(meta), "angle_scale": _angle_scale(meta)}
    if "norm" not in meta or meta["norm"] in (None, "none", False):
        mode = str(meta.get("eps_mode", "clamp_min"))
        if mode not in DENOMINATORS:
            raise Unsupported(f"eps_mode={mode!r} is unknown")
        return options | {"denominator": DENOMINATORS[mode], "eps": float(meta.get("eps", 1e-6))}
    text = str(meta["norm"]).lower().replace(" ", "")
    known = {"rms": "rms", "rmsnorm": "rms", "layer": "layer", "layernorm": "layer"}
    simple = text.startswith("x/(||x||") or text.startswith(("srms", "simple"))
    if not simple and text not in known:
        raise Unsupported(f"norm={meta['norm']!r} is unknown")
    return options | {
        "denominator": "norm",
        "norm": "srms" if simple else known[text],
        "norm_eps": float(meta.get("norm_eps", meta.get("eps", 1e-8))),
        "norm_per_head": bool(meta.get("norm_per_head", "sqrt(d)" in text)),
    }


def _config(meta: dict, bias: bool, out: bool) -> CosformerConfig:
    options = _options(meta)
    if "norm_eps" in options:
        options["output_norm_eps"] = options.pop("norm_eps")
    if "H" not in meta:
        raise Unsupported("the number of heads (H) is missing")
    heads = {"num_heads": int(meta["H"]), "head_dim": int(meta.get("D", 0))}
    return CosformerConfig(**options, **heads, qkv_bias=bias, out_bias=bias, out_proj=out)


def _lengths(golden: Golden, T: int, S: int) -> dict:
    """m_mode and max_length: M of the file, or that of the published code, the longer of T and S."""
    M = golden.meta.get("M")
    if M is None or M == "max(T,S)" or _angle_scale(golden.meta) == 0:
        return {"m_mode": "length"}
    if isinstance(M, str) and not M.isdigit():
        if "sample" in M or "sequence" in M:
            return {"m_mode": "per_sequence"}
        raise Unsupported(f"M={M!r} is unknown")
    return {"m_mode": "length"} if int(M) == max(T, S) else {"m_mode": "fixed", "max_length": int(M)}


def _key_mask(golden: Golden, S: int):
    """bool [B, S], True for keys that are seen; None: all are."""
    x = golden.inputs
    if "key_mask" in x:
        return x["key_mask"].astype(bool)
    return np.arange(S) < x["lengths"][:, None] if "lengths" in x else None


def _mask(golden: Golden, dense: bool):
    """(mask, allowed, key mask) of an operator file; None if only the dense form can hold it.

    Without `dense`, an `allowed` matrix is recognised as causal or not, with hidden keys or packed documents.
    """
    x, causal = golden.inputs, bool(golden.meta.get("causal", False))
    S, keys = x["k"].shape[1], _key_mask(golden, x["k"].shape[1])
    segments = {f"{side}_segments": x["segments"].astype(np.int32) for side in ("q", "kv") if "segments" in x}
    mask = Mask(causal=causal, **{n: jnp.asarray(a) for n, a in segments.items()})
    if "allowed" not in x:
        return mask, None, keys
    allowed = x["allowed"].astype(bool)
    allowed = np.broadcast_to(allowed, (x["q"].shape[0], *allowed.shape[-2:]))
    if dense:
        return mask, allowed, keys
    if causal or segments or keys is not None:
        return None
    B, T = allowed.shape[:2]
    seen, tril = allowed.any(1), np.tri(T, S, dtype=bool)
    for causal in (True, False):
        if np.array_equal(allowed, seen[:, None] & (tril if causal else True)):
            return Mask(causal=causal), None, seen
        if T == S:
            documents = np.cumsum(~np.diagonal(allowed, -1, 1, 2), axis=1) + 1
            documents = np.concatenate([np.ones((B, 1), np.int64), documents], axis=1).astype(np.int32)
            same = documents[:, :, None] == documents[:, None]
            if np.array_equal(allowed, same & (tril if causal else True)):
                shared = jnp.asarray(documents)
                return Mask(causal=causal, q_segments=shared, kv_segments=shared), None, None
    return None


def _refuse(names: set, what: str) -> None:
    if names:
        raise Unsupported(f"the {what} {', '.join(sorted(names))} are unknown")
