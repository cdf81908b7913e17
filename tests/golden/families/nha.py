"""Native Hybrid Attention: the operator in all its forms, decoding, the layer and the language model.

Published names: f gate logits, hk [B, K, D, M] and hv [B, K, M, Dv] the slots, win_* the kept tokens, wf the gate's
weight.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.native_hybrid import (
    NativeHybridAttention,
    NativeHybridConfig,
    extend_slots,
    init_slots,
    merge_branches,
    native_hybrid_attention,
    slot_branch,
    slot_log_gates,
    slot_mass,
    window_branch,
)
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel
from kernels.masks import Mask
from kernels.slots import SlotState
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("blockwise", "reference")
FEATURE_MAPS = {
    "none": "identity",
    "identity": "identity",
    "": "identity",
    "swish": "swish",
    "silu": "swish",
    "relu": "relu",
}
EMPTY = {"sink": "sink", "mask": "mask", "masked": "mask"}
STYLES = {"scratch": "scratch", "release": "scratch", "llama": "converted", "qwen2": "converted",
          "qwen3": "converted", "qwen": "converted", "llm": "converted", "converted": "converted"}  # fmt: skip


def is_hybrid(golden: Golden) -> bool:
    return "M" in golden.meta and ("window" in golden.meta or "windows" in golden.meta)


def choice(meta: dict, names: tuple[str, ...], known: dict, default):
    """The setting under the first of `names` that a file has, through the table of spellings."""
    for name in names:
        if meta.get(name) is not None:
            spelling = str(meta[name]).lower()
            if spelling not in known:
                raise Unsupported(f"{name}={meta[name]!r} is unknown; known: {', '.join(map(repr, known))}")
            return known[spelling]
    return default


def number(meta: dict, default, *names: str):
    return next((meta[name] for name in names if meta.get(name) is not None), default)


def gate_options(meta: dict) -> dict:
    minimum = number(meta, None, "log_gate_min", "gate_min", "g_min")
    return {
        "tau": float(number(meta, 8.0, "tau", "gate_logit_normalizer")),
        "log_gate_min": -np.inf if minimum is None else float(minimum),
    }


def operator_options(meta: dict, D: int) -> dict:
    shift = number(meta, None, "slot_shift", "shift")
    return {
        "window": int(meta["window"]),
        "slot_shift": None if shift is None else int(shift),
        "rope_theta": float(number(meta, 10_000.0, "rope_theta", "theta")),
        "slot_feature_map": choice(meta, ("slot_feature_map", "feature_map"), FEATURE_MAPS, "identity"),
        "empty_slots": choice(meta, ("empty_slots",), EMPTY, "sink"),
        "scale": float(number(meta, D**-0.5, "scale")),
    }


def documents(golden: Golden, B: int, T: int) -> np.ndarray | None:
    """Documents numbered from 1 with 0 for padding, [B, T], or None where every token is one document."""
    given = golden.inputs
    valid = next((given[n] for n in ("valid", "mask", "attention_mask") if n in given), None)
    numbers = next((given[n] for n in ("segment_ids", "segments", "seg_ids", "seg") if n in given), None)
    if numbers is None and "cu_seqlens" in given:
        numbers = np.searchsorted(given["cu_seqlens"].ravel(), np.arange(T), side="right")[None]
    if numbers is None and valid is None:
        return None
    if numbers is None:
        numbers = np.zeros((B, T), np.int32)
    elif valid is None:
        valid = numbers >= 0
        lengths = golden.meta.get("lengths")
        if lengths and np.isscalar(lengths[0]) and sum(lengths) == np.count_nonzero(numbers[0]) < T:
            valid = numbers > 0  # zeros number the padding
    numbers = numbers - min(int(numbers.min()), 0) + 1
    return np.broadcast_to(np.where(np.asarray(valid).astype(bool), numbers, 0).astype(np.int32), (B, T))


def positions_of(golden: Golden, B: int, T: int):
    given = golden.inputs.get("positions", golden.inputs.get("position_ids"))
    return np.arange(T)[None] if given is None else np.broadcast_to(given, (B, T))


def initial_state(operands: dict) -> SlotState | None:
    if "hk0" not in operands:
        return None
    return SlotState(operands["hk0"].swapaxes(2, 3), operands["hv0"])


def gates_of(golden: Golden, operands: dict):
    return slot_log_gates(operands["f"], **gate_options(golden.meta)) if "f" in operands else operands["g"]


def outputs_of(
    golden: Golden, operands: dict, wanted: set[str], implementation: str, empty: str | None
) -> dict:
    """Everything the operator's files may ask for, by name without the prefix "out."."""
    q, k, v = (operands[name] for name in "qkv")
    (B, T, _, D), meta = q.shape, golden.meta
    options = operator_options(meta, D) | ({"empty_slots": empty} if empty else {})
    numbers = documents(golden, B, T)
    mask = Mask() if numbers is None else Mask(q_segments=numbers, kv_segments=numbers)
    shared = {"mask": mask, "scale": options["scale"], "implementation": implementation}
    g, positions = gates_of(golden, operands), positions_of(golden, B, T)
    o, state, lse, branches = native_hybrid_attention(
        q, k, v, g, positions=positions, initial_state=initial_state(operands),
        return_state=True, return_lse=True, return_branch_lse=True, **(options | shared),
    )  # fmt: skip
    outputs = {
        "o": o,
        "hk": state.key.swapaxes(2, 3),
        "hv": state.value,
        "lse": lse,
        "log_gate": g,
        "log_gates": g,
    }
    outputs |= {"slot_mass": slot_mass(*branches), "lse_slots": branches[0], "lse_window": branches[1]}
    if wanted & {"o_slots", "o_window"}:
        shift = options["window"] if options["slot_shift"] is None else options["slot_shift"]
        of_slots = {n: options[n] for n in ("empty_slots", "slot_feature_map")}
        o_slots, lse_slots = slot_branch(
            q, k, v, g, slot_shift=shift, initial_state=initial_state(operands), **of_slots, **shared
        )
        o_window, lse_window = window_branch(
            q, k, v, window=options["window"], positions=positions, rope_theta=options["rope_theta"], **shared
        )
        outputs |= {
            "o_slots": o_slots,
            "lse_slots": lse_slots,
            "o_window": o_window,
            "lse_window": lse_window,
        }
        outputs["o"], outputs["lse"] = merge_branches(o_slots, lse_slots, o_window, lse_window)
    return outputs


@family(
    "NHA operator",
    when=lambda g: (
        is_hybrid(g) and {"q", "f"} & g.inputs.keys() == {"q", "f"} and "prefill_len" not in g.meta
    ),
)
def operator(golden: Golden):
    """out.X, or out.X_sink and out.X_mask side by side; gradients of the sum of every output times its cotangent."""
    results = golden.results
    suffixes = [s for s in ("_sink", "_mask") if any(key.endswith(s) for key in results)] or [""]
    floats = {n: jnp.asarray(x) for n, x in golden.inputs.items() if x.dtype.kind == "f"}
    for implementation in IMPLEMENTATIONS:
        values = {}
        for suffix in suffixes:
            mine = [key for key in results if key.endswith(suffix)]
            wanted = {key.removeprefix("out.").removesuffix(suffix) for key in mine}

            def loss(operands, wanted=wanted, suffix=suffix, implementation=implementation):
                outputs = outputs_of(
                    golden, operands, wanted, implementation, suffix.removeprefix("_") or None
                )
                other = tuple(s for s in suffixes if s != suffix)
                cotangents = {
                    n.removesuffix(suffix): x for n, x in golden.cotangents.items() if not n.endswith(other)
                }
                total = sum((jnp.sum(outputs[n] * x) for n, x in cotangents.items()), jnp.zeros(()))
                return total, outputs

            gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(floats)
            values |= {f"out.{n}{suffix}": x for n, x in outputs.items()}
            values |= {f"grad.{n}{suffix}": x for n, x in gradients.items()}
        yield implementation, values


@family("NHA decoding", when=lambda g: is_hybrid(g) and "f" in g.inputs and "prefill_len" in g.meta)
def decoding(golden: Golden):
    """Prefill, then one token at a time."""
    given, P = golden.inputs, int(golden.meta["prefill_len"])
    q, k, v = (jnp.asarray(given[name]) for name in "qkv")
    (B, T, _, D), g = q.shape, gates_of(golden, {n: jnp.asarray(x) for n, x in given.items()})
    options = operator_options(golden.meta, D)
    shift = options["window"] if options["slot_shift"] is None else options["slot_shift"]
    valid = documents(golden, B, T)
    starts = None if valid is None else jnp.asarray((valid == 0).sum(1), jnp.int32)
    kept = max(options["window"], shift)
    state = initial_state(given)
    for implementation in IMPLEMENTATIONS:
        cache = init_slots(B, kept, k.shape[2], g.shape[3], D, v.shape[3], q.dtype, starts=starts)
        step = jax.jit(
            lambda cache, *x, name=implementation: extend_slots(
                cache, *x, initial_state=state, implementation=name, **options
            )
        )
        outputs, values = [], {}
        for first, end in [(0, P), *((t, t + 1) for t in range(P, T))]:
            if end > first:
                o, _, cache = step(cache, *(x[:, first:end] for x in (q, k, v, g)))
                outputs.append(o)
            if end == P:
                values |= held(cache, P, "after_prefill")
        o = jnp.concatenate(outputs, 1)
        values |= {"out.o": o, "out.o_prefill": o[:, :P], "out.o_decode": o[:, P:]} | held(cache, T, "final")
        yield implementation, values


def held(cache, seen: int, when: str) -> dict:
    """The cache under published names; the window oldest first, fewer rows while fewer tokens were seen."""
    rows = min(seen, cache.key.shape[1])
    window = {"win_k": cache.key, "win_v": cache.value, "win_g": cache.log_gates}
    values = {name: x[:, x.shape[1] - rows :] for name, x in window.items()}
    values |= {"hk": cache.key_slots.swapaxes(2, 3), "hv": cache.value_slots}
    return {f"out.{name}_{when}": x for name, x in values.items()}


KERNELS = {
    "wq": "query", "wk": "key", "wv": "value", "wo": "out", "wf": "forget_gate", "wg": "forget_gate",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out",
    "g_proj": "forget_gate", "f_proj": "forget_gate",
}  # fmt: skip
PARTS = {"q": "query", "k": "key", "v": "value"}


def our_name(name: str) -> tuple[str, ...]:
    """Path in NativeHybridAttention's parameters of a published weight."""
    plain = name.lower().removesuffix(".weight").removesuffix("_weight")
    if plain in KERNELS:
        return KERNELS[plain], "kernel"
    if plain in ("g_norm", "gnorm", "o_norm"):
        return "output_norm", "scale"
    if match := re.fullmatch(r"w?_?([qk])_?(?:norm|n)|norm_?([qk])", plain):
        return f"{PARTS[match[1] or match[2]]}_norm", "scale"
    part = (
        re.sub(r"conv(olution)?(1d)?|short|proj|[._w]", "", plain)
        if "conv" in plain
        else plain.removeprefix("c")
    )
    if plain != part and part in PARTS:
        return (f"{PARTS[part]}_conv",)
    if part := re.fullmatch(r"b_?([qkv])|([qkv])(?:_proj)?[._]?(?:b|bias)", plain):
        return PARTS[part[1] or part[2]], "bias"
    raise Unsupported(f"the weight {name!r} is unknown")


def our_shape(name: str, x, heads: dict[str, int]):
    """Norm weights stored flat [H*D] as [H, D]; convolutions as [taps, channels]."""
    path = our_name(name)
    if path[0] in heads and x.ndim == 1 and x.shape[0] != heads["D"]:
        return x.reshape(heads[path[0]], heads["D"])
    if path[0].endswith("_conv") and x.ndim == 3:
        return x.reshape(x.shape[0], -1).T  # stored [channels, 1, taps]
    return x


def layer_params(weights: dict, heads: dict[str, int]) -> dict:
    params: dict = {}
    for name, x in weights.items():
        *folder, last = our_name(name)
        (params.setdefault(folder[0], {}) if folder else params)[last] = our_shape(name, x, heads)
    return params


def heads_of(meta: dict) -> dict[str, int]:
    K = int(number(meta, meta["HQ"], "Hkv", "H"))
    return {"query_norm": int(meta["HQ"]), "key_norm": K, "D": int(meta["K"])}


def layer_config(golden: Golden, weights: dict) -> NativeHybridConfig:
    meta, names = golden.meta, {our_name(name): x for name, x in weights.items()}
    heads = heads_of(meta)
    options = operator_options(meta | {"window": meta.get("window", 0)}, heads["D"])
    if abs(options.pop("scale") - heads["D"] ** -0.5) > 1e-12:
        raise Unsupported(f"a layer's scale is K ** -0.5, not {meta['scale']}")
    shift = options.pop("slot_shift")
    norm = names.get(("query_norm", "scale"))
    conv = names.get(("query_conv",))
    default = "scratch" if ("output_norm", "scale") in names else "converted"
    return NativeHybridConfig(
        num_heads=heads["query_norm"], num_kv_heads=heads["key_norm"], head_dim=heads["D"], slots=int(meta["M"]),
        value_dim=int(number(meta, heads["D"], "V")), style=choice(meta, ("style",), STYLES, default),
        slot_shift=-1 if shift is None else shift, qkv_bias=("query", "bias") in names,
        conv_size=0 if conv is None else (conv.shape[0] if conv.ndim == 2 else conv.shape[-1]),
        qk_norm=norm is not None, qk_norm_shared=norm is not None and norm.shape == (heads["D"],),
        qk_norm_eps=float(number(meta, 1e-6, "qk_norm_eps", "qknorm_eps")),
        output_norm_eps=float(number(meta, 1e-5, "g_norm_eps")), **gate_options(meta), **options,
    )  # fmt: skip


def with_implementation(config: NativeHybridConfig, name: str) -> NativeHybridConfig:
    return NativeHybridConfig(**(vars(config) | {"implementation": name}))


@family("NHA layer", when=lambda g: is_hybrid(g) and "x" in g.inputs and "y" in g.cotangents)
def layer(golden: Golden):
    """y, and the gradients of sum y cot over x and every weight."""
    x = golden.inputs["x"]
    B, T, C = x.shape
    weights = {n: jnp.asarray(w) for n, w in golden.params.items()}
    heads, base = heads_of(golden.meta), layer_config(golden, weights)
    segments, positions = documents(golden, B, T), positions_of(golden, B, T)
    for name in IMPLEMENTATIONS:
        config = with_implementation(base, name).resolve(0, 0, 0, C)
        module = NativeHybridAttention(config, C, dtype=jnp.float64, param_dtype=jnp.float64)

        @jax.jit
        def run(weights, x, module=module):
            def loss(weights, x):
                params = {"params": layer_params(weights, heads)}
                y = module.apply(params, x, positions=positions, segments=segments)
                return jnp.sum(y * golden.cotangents["y"]), y

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, x)

        (of_weights, of_x), y = run(weights, x)
        gradients = {f"grad.{n}": w for n, w in of_weights.items()}
        yield name, {"out.y": y, "grad.x": of_x} | gradients


MLP = ("gate", "up", "down")


def of_mixer(weights: dict) -> dict:
    """What of a block's weights is the mixer's."""
    return {n: w for n, w in weights.items() if n not in (*MLP, "attn_norm", "mlp_norm")}


def block_params(weights: dict, heads: dict[str, int]) -> dict:
    """One block's parameters from the names below "l{i}."."""
    return {
        "mixer": layer_params(of_mixer(weights), heads),
        "mixer_norm": {"scale": weights["attn_norm"]},
        "mlp_norm": {"scale": weights["mlp_norm"]},
        "mlp": {n: {"kernel": weights[n]} for n in MLP},
    }


def below(weights: dict, prefix: str) -> dict:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def model_params(weights: dict, config: ModelConfig, heads: dict[str, int]) -> dict:
    period = len(config.layer_configs())
    params = {"embedding": weights["embed"], "final_norm": {"scale": weights["norm"]}}
    if not config.tie_embeddings:
        params["head"] = weights["lm_head"]
    for i in range(config.num_layers):
        blocks = params.setdefault(f"layers_{i // period}", {})
        blocks[f"blocks_{i % period}"] = block_params(below(weights, f"l{i}."), heads)
    return params


@family("NHA language model", when=lambda g: is_hybrid(g) and "ids" in g.inputs and "windows" in g.meta)
def language_model(golden: Golden):
    """Logits, the mean cross-entropy of each next token, and the gradient of every weight."""
    meta, ids = golden.meta, golden.inputs["ids"]
    weights = {n: jnp.asarray(w) for n, w in golden.params.items()}
    heads, windows = heads_of(meta), [int(w) for w in meta["windows"]]
    segments, positions = documents(golden, *ids.shape), positions_of(golden, *ids.shape)
    for name in IMPLEMENTATIONS:
        mixer = with_implementation(layer_config(golden, of_mixer(below(weights, "l0."))), name)
        config = ModelConfig(
            layers=" + ".join(f"native_hybrid(window={w})" for w in windows), num_layers=len(windows),
            hidden_size=int(meta["D"]), num_heads=mixer.num_heads, mlp_size=weights["l0.gate"].shape[1],
            vocab_size=weights["embed"].shape[0], tie_embeddings="lm_head" not in weights, dtype="float64",
            norm_eps=float(number(meta, 1e-6, "norm_eps")), scan_layers=False, mixers={"native_hybrid": mixer},
        )  # fmt: skip
        model = LanguageModel(config)

        def loss(weights, model=model, config=config):
            params = {"params": model_params(weights, config, heads)}
            logits = model.apply(params, ids, positions=positions, segments=segments)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], -1)), logits

        (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        yield name, {"out.loss": value, "out.logits": logits} | {f"grad.{n}": w for n, w in gradients.items()}
