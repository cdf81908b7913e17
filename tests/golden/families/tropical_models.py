"""Encoder models of Tropical Attention: outputs and all gradients, training trajectories, and adaptive softmax.

Published names everywhere; a shared attention is listed once, with its summed gradient.
"""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

from attnlab.attention.adaptive import adaptive_softmax
from attnlab.attention.tropical import MHTAConfig
from attnlab.models.set_encoder import SetEncoder, SetEncoderConfig
from attnlab.models.set_encoder_weights import published_weights, set_encoder_params
from kernels.forgetting import IMPLEMENTATIONS as SOFTMAX_IMPLEMENTATIONS
from kernels.tropical.attention import IMPLEMENTATIONS as TROPICAL_IMPLEMENTATIONS
from tests.golden.registry import Golden, Unsupported, family

ATTENTION = r"encoder\.layers\.(\d+)\.attn\."


@family("adaptive softmax", when=lambda g: "in.logits" in g.arrays and "out.probs" in g.arrays)
def softmax_rows(golden: Golden):
    @jax.jit
    def run(logits, cotangent):
        probs, pull = jax.vjp(adaptive_softmax, logits)
        return {
            "out.probs": probs,
            "grad.logits": pull(cotangent)[0],
            "out.loss": jnp.sum(probs * cotangent)[None],
        }

    yield "dense", run(golden.inputs["logits"], golden.cotangents["probs"])


def is_model(golden: Golden) -> bool:
    return "input_linear.weight" in golden.params


@family("set encoder", when=lambda g: is_model(g) and "cot.y" in g.arrays)
def model(golden: Golden):
    classification = _flag(golden, "classification", golden.arrays["out.y"].shape[-1:] == (1,))
    for label, config in configs(golden, classification):
        params = set_encoder_params(golden.params, config)

        def loss(params, x, config=config):
            y = SetEncoder(config).apply({"params": params}, x)
            return jnp.sum(y * golden.cotangents["y"]), y

        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (total, y), (grads, grad_x) = compute(params, golden.inputs["x"])
        grads = {f"grad.{name}": g for name, g in published_weights(grads, config).items()}
        yield label, grads | {"out.y": y, "out.loss": total[None], "grad.x": grad_x}


@family("set encoder training", when=lambda g: is_model(g) and "out.losses" in g.arrays)
def training(golden: Golden):
    x, target = jnp.asarray(golden.inputs["x"]), jnp.asarray(golden.inputs["y"])
    classification = _flag(golden, "classification", True)
    for label, config in configs(golden, classification):
        optimizer = _optimizer(golden)
        params = set_encoder_params(golden.params, config)
        # The final norm of a post-norm model has no gradient: neither updates nor weight decay reach it.
        fixed = {name: params.pop(name) for name in ("final_norm",) if not config.pre_norm and name in params}

        def loss(params, config=config, fixed=fixed):
            y = SetEncoder(config).apply({"params": params | fixed}, x).reshape(target.shape)
            each = optax.sigmoid_binary_cross_entropy(y, target) if classification else (y - target) ** 2
            return each.mean()

        def step(carry, _, optimizer=optimizer, loss=loss):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        @jax.jit
        def run(params, optimizer=optimizer, step=step):
            steps = golden.arrays["out.losses"].shape[0]
            return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)

        (params, _), losses = run(jax.tree.map(jnp.asarray, params))
        final = published_weights(params | fixed, config)
        yield label, {f"out.final.{name}": value for name, value in final.items()} | {"out.losses": losses}


def configs(golden: Golden, classification: bool) -> Iterator[tuple[str, SetEncoderConfig]]:
    """The encoder of a file, once for every implementation of its attention: sizes from arrays, the rest from meta."""
    weights = golden.params
    layers = 1 + max(int(i) for i in re.findall(r"encoder\.layers\.(\d+)\.", " ".join(weights)))
    with_attention = {i for i in re.findall(ATTENTION, " ".join(weights))}
    hidden, features = weights["input_linear.weight"].shape
    kind = attention_kind(golden)
    shared = layers > 1 and len(with_attention) == 1
    if not shared and len(with_attention) != layers:
        raise Unsupported(f"{len(with_attention)} of {layers} layers have attention; all of them or one must")
    base = dict(
        features=features,
        hidden_size=hidden,
        num_heads=int(_setting(golden, "n_heads", "num_heads", "H", default=2)),
        num_layers=layers,
        attention=kind,
        mhta=mhta_options(golden) if kind == "tropical" else MHTAConfig(),
        pooled=_flag(golden, "pool", False),
        num_outputs=len(weights["output_linear.weight"]),
        regression=not classification,
        pre_norm=_flag(golden, "pre_norm", False),
        share_attn_across_layers=shared,
        norm_eps=float(_setting(golden, "layer_norm_eps", "norm_eps", default=1e-5)),
        dtype="float64",
    )
    base["published_final_norm"] = not base["pre_norm"] and "encoder.last_norm.weight" in weights
    implementations = {"tropical": TROPICAL_IMPLEMENTATIONS, "vanilla": SOFTMAX_IMPLEMENTATIONS}
    for name in [each.name for each in implementations.get(kind, ())] or [""]:
        if name in ("reference", "blockwise", ""):
            yield name or "dense", SetEncoderConfig(**base, implementation=name)


def attention_kind(golden: Golden) -> str:
    """ "tropical", "vanilla" or "adaptive"; a file without the setting tells by its weights and its source."""
    names = " ".join(golden.params)
    kind = str(_setting(golden, "kind", "aggregator", "attention", default="")).lower()
    if "trop" in kind or ".query_trop." in names or "lambda_param" in names:
        return "tropical"
    text = kind or str(golden.meta.get("source", "")).lower() + str(golden.meta.get("case", "")).lower()
    return "adaptive" if "adaptive" in text else "vanilla"


def mhta_options(golden: Golden) -> MHTAConfig:
    """Options of tropical attention: from the weights where they show, else from the settings."""
    names = " ".join(golden.params)
    if not _flag(golden, "use_tropical_metric", True):
        score = "lse_dot" if _flag(golden, "use_logsumexp", False) else "maxplus_dot"
    else:
        score = "hilbert" if _flag(golden, "symmetric", True) else "hilbert_asym"
    maps = [w for name, w in golden.params.items() if name.endswith("query_trop.W")]
    return MHTAConfig(
        qkv_linear=".query_linear." in names,
        tropical_proj=bool(maps),
        per_head_trop=bool(maps) and maps[0].ndim == 3,
        gauge="lambda" if "lambda_param" in names else "none",
        score=str(_setting(golden, "score", default=score)),
    )


def _optimizer(golden: Golden) -> optax.GradientTransformation:
    """The optimiser of a trajectory, with torch's meaning of its settings."""
    name = str(_setting(golden, "optimizer", "optimiser", default="adamw")).lower()
    rate = float(_setting(golden, "lr", "learning_rate", default=1e-3))
    options = _setting(golden, name, default={})
    if options.get("amsgrad"):
        raise Unsupported("amsgrad=True is no optimiser of this project")
    if name not in ("adamw", "adam"):
        raise Unsupported(f"optimizer {name!r} of a trajectory is not known; adam and adamw are")
    b1, b2 = options.get("betas", (0.9, 0.999))
    decay = options.get("weight_decay", 0.01 if name == "adamw" else 0.0)
    adam = optax.scale_by_adam(b1, b2, options.get("eps", 1e-8))
    decayed = optax.add_decayed_weights(decay)
    decoupled = options.get("decoupled", name == "adamw")
    chain = (adam, decayed) if decoupled else (decayed, adam)
    return optax.chain(*chain, optax.scale(-rate))


def _setting(golden: Golden, *names: str, default):
    """The first of the names in meta's settings or meta itself, or written as name=value in the source."""
    settings = golden.meta | golden.meta.get("settings", {})
    for name in names:
        if name in settings:
            return settings[name]
        found = re.search(rf"\b{name}=(\w+)", str(golden.meta.get("source", "")))
        if found:
            return found[1]
    return default


def _flag(golden: Golden, name: str, default: bool) -> bool:
    value = _setting(golden, name, default=default)
    if str(value).lower() not in ("true", "false", "1", "0"):
        raise Unsupported(f"{name}={value!r} is neither true nor false")
    return str(value).lower() in ("true", "1")
