"""Whole language models of Deconstructing Attention (arXiv 2510.11602): logits, loss, gradients, skipped layers."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np

import attnlab.attention.sourced
import attnlab.attention.taylor  # noqa: F401 (registers kinds)
from attnlab.attention.mixer import MIXERS, find_mixer
from attnlab.models.config import ModelConfig
from attnlab.models.language_model import LanguageModel
from attnlab.models.streams import StreamConfig
from attnlab.objectives.language_modelling import token_losses
from tests.golden.registry import Golden, Unsupported, family

# name in the files: name here, for parameters of a layer
PARAMETERS = {
    "norm1": "mixer_norm/scale",
    "norm2": "mlp_norm/scale",
    "w_gate": "mlp/gate/kernel",
    "w_up": "mlp/up/kernel",
    "w_down": "mlp/down/kernel",
    "wq": "mixer/query/kernel",
    "wk": "mixer/key/kernel",
    "wv": "mixer/value/kernel",
    "wo": "mixer/out/kernel",
    "bq": "mixer/query/bias",
    "bk": "mixer/key/bias",
    "bv": "mixer/value/bias",
    "q_norm": "mixer/query_norm/scale",
    "k_norm": "mixer/key_norm/scale",
    "m_gate": "mixer/gate/kernel",
    "m_up": "mixer/up/kernel",
    "m_down": "mixer/down/kernel",
    "bm_gate": "mixer/gate/bias",
    "bm_up": "mixer/up/bias",
    "bm_down": "mixer/down/bias",
    "static_norm": "mixer/source_norm/scale",
    "norm_static": "mixer/source_norm/scale",
    "norm_own": "mixer/source_norm/scale",
}
TOP = {"embed": "embedding", "head": "head", "final_norm": "final_norm/scale"}
# setting in the files: (kinds, option here); settings without a kind's option do not concern it
OPTIONS = {
    "theta": "rope_theta",
    "rope_theta": "rope_theta",
    "qk_norm": "qk_norm",
    "static_norm": "static_norm",
    "approx_form": "approx_form",
    "approx_rope": "approx_rope",
    "nonapprox_scale": "scale",
    "nonapprox_norm_order": "norm_order",
    "norm_order": "norm_order",
    "logit_softcap": "logit_softcap",
    "mlp_match": "mlp_match",
    "form": "approx_form",
}
STREAMS = {"sigma": "sigma", "rnd_sigma": "sigma", "stop_grad_x": "stop_grad_x", "train_eps": "train_eps"}
SIZES = {"vocab", "d", "n_heads", "n_kv", "head_dim", "ffn", "tied", "layers", "norm_eps", "eps", "init"}
SIZES |= {"tie_embeddings", "qkv_bias", "n_layers", "N", "max_len", "L"}


def is_model(golden: Golden) -> bool:
    return "in.tokens" in golden.arrays and "layers" in golden.meta.get("cfg", {})


def layer_settings(entry) -> tuple[str, dict]:
    """(kind, settings) of a layer: "approx", "approx{form=diag_joint}" or {"kind": "approx", ...}."""
    if isinstance(entry, dict):
        entry = dict(entry)
        return entry.pop("kind", None) or entry.pop("name"), entry
    kind, brace, rest = entry.replace("}", "").partition("{")
    pairs = [pair.split("=", 1) for pair in rest.split(",")] if brace else []
    return kind.strip(), {name.strip(): literal(value.strip()) for name, value in pairs}


def literal(text: str):
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text


def layer_options(golden: Golden, index: int, implementation: str) -> tuple[str, dict]:
    """(mixer, its options) of layer `index` from the model's settings, the layer's own, and its arrays."""
    cfg = golden.meta["cfg"]
    kind, own = layer_settings(cfg["layers"][index])
    if kind not in MIXERS:
        raise Unsupported(f"kind {kind!r} does not exist")
    given = {name: value for name, value in cfg.items() if name in OPTIONS} | own
    unknown = (cfg.keys() - OPTIONS.keys() - STREAMS.keys() - SIZES) | (own.keys() - OPTIONS.keys())
    if unknown:
        raise Unsupported(f"setting {sorted(unknown)[0]!r} is not known")
    known = find_mixer(kind).Config.__dataclass_fields__
    options = {OPTIONS[name]: value for name, value in given.items() if OPTIONS[name] in known}
    for name in ("scale", "logit_softcap"):
        if name in options:
            options[name] = float(options[name] or 0)
    if "rope_theta" in options:
        options["rope_theta"] = float(options["rope_theta"])
    if "qk_norm_shared" in known and options.get("qk_norm"):
        options |= {"qk_norm_shared": True, "qk_norm_eps": norm_eps(cfg)}
    options["qkv_bias"] = any(f"param.layers.{index}.{name}" in golden.arrays for name in ("bq", "bm_gate"))
    if kind != "mlp":
        options["implementation"] = implementation
    return kind, {name: value for name, value in options.items() if name in known}


def norm_eps(cfg: dict) -> float:
    return cfg.get("norm_eps", cfg.get("eps", 1e-6))


def model_config(golden: Golden, implementation: str, scan_layers: bool) -> ModelConfig:
    cfg = golden.meta["cfg"]
    layers = [layer_options(golden, index, implementation) for index in range(len(cfg["layers"]))]
    pattern = [f"{kind}({', '.join(f'{k}={v!r}' for k, v in options.items())})" for kind, options in layers]
    streams = {STREAMS[name]: value for name, value in cfg.items() if name in STREAMS}
    streams |= {"train_eps": True}  # the same numbers, and the gradient of eps beside them
    if "eps" in golden.inputs:
        streams["length"] = len(golden.inputs["eps"])
    if "fixed_tokens" in golden.inputs:
        streams["fixed_tokens"] = tuple(golden.inputs["fixed_tokens"].tolist())
    return ModelConfig(
        layers=" + ".join(pattern),
        num_layers=len(layers),
        hidden_size=cfg["d"],
        num_heads=cfg["n_heads"],
        num_kv_heads=cfg.get("n_kv", 0) or 0,
        head_dim=cfg.get("head_dim", 0) or 0,
        mlp_size=cfg["ffn"],
        vocab_size=cfg["vocab"],
        tie_embeddings="param.head" not in golden.arrays,
        norm_eps=norm_eps(cfg),
        dtype="float64",
        scan_layers=scan_layers,
        streams=StreamConfig(**streams),
    )


def our_name(name: str, period: int) -> str:
    """The path here, in a model laid out layer by layer, of a parameter in a file."""
    if not name.startswith("layers."):
        return TOP[name]
    _, index, rest = name.split(".", 2)
    if rest not in PARAMETERS:
        raise Unsupported(f"parameter {name!r} is not known")
    return f"layers_{int(index) // period}/blocks_{int(index) % period}/{PARAMETERS[rest]}"


def nested(flat: dict[str, jax.Array]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)[last] = value
    return tree


def parameters(flat: dict[str, jax.Array], config: ModelConfig) -> dict:
    """The model's parameters from those of a file (and "eps"), differentiably."""
    period = config.num_layers // config.num_periods
    names = {name: our_name(name, period) for name in flat if name != "eps"}
    tree = nested({ours: flat[name] for name, ours in names.items()})
    if "random" in config.auxiliary():
        tree["random_stream"] = flat["eps"]
    if config.scan_layers:
        periods = [tree.pop(f"layers_{index}") for index in range(config.num_periods)]
        tree["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods)
    return tree


@family("model of deconstructed attention", when=is_model, tolerance=1e-9)
def model(golden: Golden):
    """Layer by layer with dense attention; then with blockwise attention, scanned where the pattern repeats."""
    flat = dict(golden.params)
    if "eps" in golden.inputs:
        flat["eps"] = golden.inputs["eps"]
    dense = model_config(golden, "reference", scan_layers=False)
    yield "reference", compute(golden, dense, flat)
    scanned = dense.num_periods > 1  # a scan over one period would only take longer to compile
    config = model_config(golden, "blockwise", scan_layers=scanned)
    yield f"blockwise, {'scanned' if scanned else 'unrolled'}", compute(golden, config, flat)


def compute(golden: Golden, config: ModelConfig, flat: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    lm = LanguageModel(config)
    tokens, targets = (jnp.asarray(golden.inputs[name], jnp.int32) for name in ("tokens", "targets"))
    names = [layer_settings(entry)[0] for entry in golden.meta["cfg"]["layers"]]
    dropped = frozenset(index for index, name in enumerate(names, start=1) if name != "softmax")

    @jax.jit
    def run(flat):
        def loss(flat):
            logits = lm.apply({"params": parameters(flat, config)}, tokens)
            return jnp.mean(token_losses(logits, targets)[0]), logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(flat)
        values = {"out.loss": value, "out.logits": logits}
        if "out.logits_skip" in golden.arrays:
            params = parameters(flat, config)
            values["out.logits_skip"] = lm.apply({"params": params}, tokens, drop_layers=dropped)
        return values | {f"grad.{name}": gradient for name, gradient in gradients.items()}

    return run(flat)
