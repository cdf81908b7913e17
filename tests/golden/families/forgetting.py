"""Forgetting Transformer: the operator (with and without pruning), the attention layer, the language model.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.forgetting import ForgettingAttention, ForgettingCache, ForgettingConfig
from attnlab.models.config import ModelConfig
from attnlab.models.fox_weights import attention_params, model_params
from attnlab.models.language_model import LanguageModel
from attnlab.objectives.language_modelling import token_losses
from attnlab.training.trees import named_leaves
from kernels.forgetting import BlockSizes, Mask, acp_delta, acp_end, acp_start, forgetting_attention
from tests.golden.registry import Golden, Unsupported, family

IMPLEMENTATIONS = ("reference", "blockwise")
OPERANDS = ("q", "k", "v", "log_fgate")
NOTHING_SEEN = -1e30  # how the files write the lse of a row without a visible key


def at_most_float32(golden: Golden, key: str) -> float:
    """Outputs of these files are float64 results of inputs on a coarse grid, many stored in float32."""
    return 1e-11 if golden.arrays[key].dtype == np.float64 else 1e-6


# The operator.


@family("forgetting operator", when=lambda g: "log_fgate" in g.inputs, tolerance=at_most_float32)
def operator(golden: Golden):
    if not golden.meta.get("causal", True):
        raise Unsupported("forgetting attention is causal here, and the file's is not")
    x = [jnp.asarray(golden.inputs[name], jnp.float64) for name in OPERANDS]
    pruning = _pruning_options(golden)
    pruned = _pruned_blocks(golden, *x) if pruning else {}
    for implementation in IMPLEMENTATIONS:
        values = _attend(golden, x, implementation, pruning) | pruned
        if pruning:
            full = _attend(golden, x, implementation, {})
            values |= {"out.o_full": full["out.o"]}
            values |= {f"grad.{name}_full": full[f"grad.{name}"] for name in OPERANDS}
        yield implementation, values


def _mask(golden: Golden) -> Mask:
    starts = golden.meta.get("seq_start")
    starts = None if starts is None else jnp.asarray(starts, jnp.int32)
    return Mask(
        q_offset=golden.meta.get("query_offset") or 0, window=golden.meta.get("window"), starts=starts
    )


def _pruning_options(golden: Golden) -> dict:
    mode = golden.meta.get("threshold_mode")
    if mode is None:
        return {}
    if mode not in ("auto", "fixed"):
        raise Unsupported(f"threshold_mode={mode!r} is neither 'auto' nor 'fixed'")
    options = {"block_sizes": BlockSizes(golden.meta["block_q"], golden.meta["block_k"])}
    if mode == "auto":
        return options | {
            "acp_threshold": "auto",
            "log_pruning_tolerance": golden.meta["log_pruning_tolerance"],
        }
    return options | {"acp_threshold": jnp.asarray(golden.inputs["threshold"], jnp.float64)}


def _attend(golden: Golden, x: list, implementation: str, pruning: dict) -> dict:
    def loss(*x):
        o, lse = forgetting_attention(
            *x, mask=_mask(golden), scale=golden.meta.get("sm_scale"), return_lse=True,
            implementation=implementation, **pruning,
        )  # fmt: skip
        return jnp.sum(o * golden.cotangents["o"]), (o, lse)

    gradients, (o, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*x)
    lse = jnp.where(lse == -jnp.inf, NOTHING_SEEN, lse).swapaxes(1, 2)
    # The stored number for "nothing" is rounded to the file's type.
    lse = np.where(lse == NOTHING_SEEN, golden.arrays["out.lse"].dtype.type(NOTHING_SEEN), lse)
    named = {f"grad.{name}": gradient for name, gradient in zip(OPERANDS, gradients, strict=True)}
    return {"out.o": o, "out.lse": lse} | named


def _pruned_blocks(golden: Golden, q, k, v, log_f) -> dict:
    """First key index of each query block and end query index of each key block under pruning."""
    meta, sizes = golden.meta, (golden.meta["block_q"], golden.meta["block_k"])
    T, S = q.shape[1], k.shape[1]
    delta = jnp.asarray(golden.inputs["threshold"])
    if meta["threshold_mode"] == "auto":
        delta = acp_delta("auto", q, k, scale=meta["sm_scale"], tolerance=meta["log_pruning_tolerance"])
    if meta.get("seq_start") is not None:
        padding = jnp.arange(S)[:, None] < jnp.asarray(meta["seq_start"])[:, None, None]
        log_f = jnp.where(padding, 0, log_f)

    def end_index(offset):
        start = acp_start(log_f, delta, offset, T, *sizes)
        return start, jnp.minimum(acp_end(start, -(-S // sizes[1])) * sizes[0], T)

    start, end = end_index(meta.get("query_offset") or 0)
    return {
        "out.start_index": (start * sizes[1]).astype(jnp.int32),
        "out.end_index": end.astype(jnp.int32),
        # The official search for the end forgets that queries may start later than keys.
        "out.end_index_official": end_index(0)[1].astype(jnp.int32),
    }


# The attention layer.

RENAMED = {
    "fgate_type": "gate",
    "fgate_bias_init": "gate_log_spaced",
    "decay_time_min": "gate_time_min",
    "decay_time_max": "gate_time_max",
    "qk_norm_share_param_across_head": "qk_norm_shared",
    "use_k_shift": "key_shift",
    "use_v_shift": "value_shift",
    "use_output_norm": "output_norm",
    "use_rope": "rope",
    "rope_base": "rope_theta",
    "ogate_act": "output_gate",
    "window_size": "window",
}


def options_of(settings: dict) -> dict:
    """ForgettingConfig fields of the official settings."""
    options = {RENAMED.get(k, k): v for k, v in settings.items() if k != "use_output_gate" and v is not None}
    unknown = options.keys() - ForgettingConfig.__dataclass_fields__.keys()
    if unknown:
        raise Unsupported(f"the setting {min(unknown)!r} is not known")
    if options.get("gate", "full") in ("fixed", "none", "full"):
        options.pop("gate_log_spaced", None)  # fixed gates always are
    gated = settings.get("use_output_gate", False)
    options["output_gate"] = options.get("output_gate", "sigmoid") if gated else "none"
    return options


def layer_tolerance(golden: Golden, key: str) -> float:
    constants_were_rounded = golden.meta["settings"].get("fgate_type") == "fixed"  # to float32
    return 1e-6 if constants_were_rounded else at_most_float32(golden, key)


@family(
    "forgetting layer",
    when=lambda g: "q_proj.weight" in g.params and "settings" in g.meta and "hidden_size" in g.meta,
    tolerance=layer_tolerance,
)
def layer(golden: Golden):
    meta, dtype = golden.meta, jnp.float64
    sizes = {"num_heads": meta["num_heads"], "head_dim": meta["head_dim"]}
    x, real = jnp.asarray(golden.inputs["x"], dtype), _real(golden, golden.inputs["x"].shape[:2])
    starts = jnp.asarray((~real).sum(1), jnp.int32)
    for implementation in IMPLEMENTATIONS:
        config = ForgettingConfig(**sizes, **options_of(meta["settings"]), implementation=implementation)
        config = config.resolve(0, 0, 0, meta["hidden_size"])
        module = ForgettingAttention(config, meta["hidden_size"], dtype=dtype, param_dtype=dtype)
        positions = jnp.arange(x.shape[1])[None] - starts[:, None]

        def loss(weights, x, module=module, config=config, positions=positions):
            params = attention_params(weights, config)
            y = module.apply({"params": params}, x, positions=positions, starts=starts)
            return jnp.sum(y * golden.cotangents["y"]), y

        weights = {name: jnp.asarray(value, dtype) for name, value in golden.params.items()}
        (of_weights, of_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
        yield (
            implementation,
            {
                "out.y": _where_real(real, y, golden.arrays["out.y"]),
                "grad.x": of_x,
                **{f"grad.{name}": value for name, value in of_weights.items()},
            },
        )


def _real(golden: Golden, shape) -> np.ndarray:
    return np.asarray(golden.inputs.get("attention_mask", np.ones(shape))) != 0


def _where_real(real, computed, stored):
    """What padded positions hold means nothing, so there the stored numbers stand in for ours."""
    return jnp.where(real.reshape(real.shape + (1,) * (stored.ndim - 2)), computed, stored)


# The language model.


@family(
    "forgetting language model",
    when=lambda g: "model.embeddings.weight" in g.params,
    tolerance=at_most_float32,
)
def language_model(golden: Golden):
    sizes = golden.meta["config"]
    attention = {k: v for k, v in sizes.items() if k in RENAMED or k in ("qk_norm", "use_output_gate")}
    tokens, labels = golden.inputs["input_ids"], golden.inputs["labels"]
    real = _real(golden, tokens.shape) & (labels >= 0)
    weights = {name: jnp.asarray(value, jnp.float64) for name, value in golden.params.items()}
    for scan in (True, False):
        config = ModelConfig(
            layers="forgetting", num_layers=sizes["num_hidden_layers"], hidden_size=sizes["hidden_size"],
            num_heads=sizes["num_heads"], mlp_size=sizes["intermediate_size"],
            vocab_size=golden.meta["vocab_size"], dtype="float64", scan_layers=scan,
            mixers={"forgetting": ForgettingConfig(**options_of(attention))},
        )  # fmt: skip
        values = _model_values(golden, LanguageModel(config), config, weights, tokens, labels, real)
        yield "scanned" if scan else "unrolled", values


def _model_values(golden, model, config, weights, tokens, labels, real) -> dict:
    starts = jnp.asarray((~real).sum(1), jnp.int32)
    params = model_params(weights, config)

    def loss(params):
        logits, state = model.apply(
            {"params": params},
            tokens,
            starts=starts,
            capture_intermediates=_is_watched,
            mutable=["intermediates"],
        )
        nll = token_losses(logits, jnp.maximum(labels, 0))[0] * real
        return jnp.sum(nll) / real.sum(), (logits, nll, state["intermediates"])

    (value, (logits, nll, seen)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    blocks = next(x for name, x in named_leaves(seen).items() if "blocks_0/__call__" in name)
    first = blocks[0] if config.scan_layers else blocks  # of the stack
    stored = golden.arrays
    values = {
        "out.logits": _where_real(real, logits, stored["out.logits"]),
        "out.loss_per_token": nll,
        "out.loss": value[None],
        "out.hidden_after_block0": _where_real(real, first, stored["out.hidden_after_block0"]),
        "out.hidden_final_normed": _where_real(
            real, seen["final_norm"]["__call__"][0], stored["out.hidden_final_normed"]
        ),
    }
    return values | _gradients(golden, grads, config) | _decoded(golden, model, params, tokens, starts, real)


def _is_watched(module, method: str) -> bool:
    return method == "__call__" and module.name in ("blocks_0", "final_norm")


def _gradients(golden: Golden, grads, config) -> dict:
    """Our gradients under the published names: the import is linear, so its transpose takes them back."""
    names = {name: jnp.zeros(value.shape) for name, value in golden.params.items()}
    _, back = jax.vjp(lambda weights: model_params(weights, config), names)
    return {f"grad.{name}": value for name, value in back(grads)[0].items()}


def _decoded(golden, model, params, tokens, starts, real) -> dict:
    """The first layer's cache after prefill and single steps, whose logits must be the parallel ones."""
    if not any(name.startswith("out.cache") for name in golden.arrays):
        return {}
    decode = jax.jit(lambda t, c: model.apply({"params": params}, t, c, method="decode"))
    cache, split = model.init_cache(tokens.shape[0], tokens.shape[1], starts), golden.meta["prefill"]
    pieces = [(0, split), *((t, t + 1) for t in range(split, tokens.shape[1]))]
    outputs = []
    for start, end in pieces:
        logits, cache = decode(tokens[:, start:end], cache)
        outputs.append(logits)
    stepped, stored = np.concatenate(outputs, 1), golden.arrays
    error = np.abs(stepped - stored["out.logits"])[real].max() / np.abs(stored["out.logits"]).max()
    if not error <= 1e-6:
        raise AssertionError(f"stepped logits differ from the parallel ones by {error:.1e}")
    caches = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, ForgettingCache))
    first = next(x for x in caches if isinstance(x, ForgettingCache))
    first = jax.tree.map(lambda x: x[0], first) if model.config.scan_layers else first
    kept = {"k": first.kv.key, "v": first.kv.value, "log_fgate": first.kv.log_f}
    values = {
        f"out.cache0.{n}": _where_real(real, x, stored[f"out.cache0.{n}"].swapaxes(1, 2)).swapaxes(1, 2)
        for n, x in kept.items()
    }
    if first.key_tail is not None:
        values["out.cache0.key_shift"] = first.key_tail.reshape(len(tokens), -1)
        values["out.cache0.value_shift"] = first.value_tail.reshape(len(tokens), -1)
    return values
