"""The FoX layer and language model against numbers of the official code, with every gradient and the decode cache."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.forgetting import ForgettingAttention, ForgettingConfig
from attnlab.models.config import ModelConfig
from attnlab.models.fox_weights import attention_params, model_params
from attnlab.models.language_model import LanguageModel
from attnlab.objectives.language_modelling import token_losses
from attnlab.training.trees import named_leaves

FOLDER = Path(__file__).parent.parent / "golden" / "forgetting"
LAYERS = sorted(path.name for path in FOLDER.glob("layer_*.npz"))
MODELS = sorted(path.name for path in FOLDER.glob("model_*.npz"))
# Relative to max(1, |reference|). Files store float64 results of float64 arithmetic, or float32 roundings of them.
PRECISIONS = {"float32": 2e-5, "float64": 1e-11}


def load(name):
    with np.load(FOLDER / name) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def below(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def options_of(settings):
    """ForgettingConfig fields of the official settings."""
    renamed = {
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
    }
    options = {
        renamed.get(name, name): value for name, value in settings.items() if name != "use_output_gate"
    }
    if options.get("gate") == "fixed":
        options.pop("gate_log_spaced")  # fixed gates always are
    return options | ({"output_gate": "sigmoid"} if settings.get("use_output_gate") else {})


def close(got, want, tolerance, name):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert error.max() <= tolerance, f"{name}: {error.max():.2e} > {tolerance:.0e}"


def tolerance_of(want, dtype):
    return max(PRECISIONS[dtype], 1e-6 if want.dtype == np.float32 else 0)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_the_official_code(name, dtype):
    arrays, meta = load(name)
    with jax.enable_x64(dtype == "float64"):
        config = ForgettingConfig(
            num_heads=meta["num_heads"], head_dim=meta["head_dim"], **options_of(meta["settings"])
        )
        config = config.resolve(0, 0, 0, meta["hidden_size"])
        layer = ForgettingAttention(
            config, meta["hidden_size"], dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype)
        )
        real = arrays.get("in.attention_mask", np.ones(arrays["in.x"].shape[:2]))
        starts = jnp.asarray((real == 0).sum(1), jnp.int32)
        params, x, cot = jax.tree.map(
            lambda value: jnp.asarray(value, dtype),
            (attention_params(below(arrays, "param."), config), arrays["in.x"], arrays["cot.y"]),
        )

        @jax.jit
        def run(params, x):
            positions = jnp.arange(x.shape[1])[None] - starts[:, None]
            return layer.apply({"params": params}, x, positions=positions, starts=starts)

        y, back = jax.vjp(run, params, x)
        grads, grad_x = back(cot)
        of_weights = {name: value for name, value in below(arrays, "grad.").items() if name != "x"}
        want = attention_params(of_weights, config)
        limit = tolerance_of(arrays["out.y"], dtype)
        if config.gate == "fixed":
            limit = max(limit, 1e-6)  # the official constant gates were rounded to float32
        close(y * real[..., None], arrays["out.y"] * real[..., None], limit, "y")
        close(grad_x * real[..., None], arrays["grad.x"] * real[..., None], limit, "grad x")
        assert_same_tree(grads, want, limit)


def assert_same_tree(got, want, limit):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        rounded = 1e-6 if value.dtype == np.float32 else 0  # stored so
        close(got[name], value, max(limit, rounded), f"gradient of {name}")


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_model_matches_the_official_code(name, scan_layers):
    arrays, meta = load(name)
    sizes = meta["config"]
    options = {k: v for k, v in sizes.items() if k.startswith(("use", "qk"))}
    config = ModelConfig(
        layers="forgetting",
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["num_heads"],
        mlp_size=sizes["intermediate_size"],
        vocab_size=meta["vocab_size"],
        scan_layers=scan_layers,
        mixers={"forgetting": ForgettingConfig(**options_of(options))},
    )
    model = LanguageModel(config)
    params = jax.tree.map(jnp.asarray, model_params(below(arrays, "param."), config))
    tokens, labels = arrays["in.input_ids"], arrays["in.labels"]
    real = labels >= 0
    starts = jnp.asarray((~real).sum(1), jnp.int32)

    @jax.jit
    def loss(params):
        logits = model.apply({"params": params}, tokens, starts=starts)
        nll = token_losses(logits, jnp.maximum(labels, 0))[0] * real
        return jnp.sum(nll) / real.sum(), (logits, nll)

    (value, (logits, nll)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    limit = PRECISIONS["float32"]
    close(value, arrays["out.loss"][0], limit, "loss")
    close(nll, arrays["out.loss_per_token"], limit, "loss per token")
    close(logits * real[..., None], arrays["out.logits"] * real[..., None], limit, "logits")
    assert_same_tree(grads, model_params(below(arrays, "grad."), config), limit)
    if scan_layers:
        check_decode(model, params, tokens, starts, real, arrays, meta["prefill"])


def check_decode(model, params, tokens, starts, real, arrays, prefill):
    """Prefill and single steps give the same logits; the first layer's cache holds the official one's numbers."""
    decode = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="decode"))
    cache = model.init_cache(tokens.shape[0], tokens.shape[1], starts)
    outputs = []
    for at, end in [(0, prefill), *((t, t + 1) for t in range(prefill, tokens.shape[1]))]:
        logits, cache = decode(params, tokens[:, at:end], cache)
        outputs.append(logits)
    limit = PRECISIONS["float32"]
    close(
        np.concatenate(outputs, 1) * real[..., None],
        arrays["out.logits"] * real[..., None],
        limit,
        "stepped logits",
    )
    first = jax.tree.map(lambda leaf: leaf[0], cache)[0]  # layer 0 of the scanned stack
    heads = real[:, None, :, None]
    for ours, theirs in ((first.kv.key, "k"), (first.kv.value, "v")):
        close(
            np.swapaxes(ours, 1, 2) * heads, arrays[f"out.cache0.{theirs}"] * heads, limit, f"cache {theirs}"
        )
    gates = np.swapaxes(first.kv.log_f, 1, 2) * real[:, None]
    close(gates, arrays["out.cache0.log_fgate"] * real[:, None], limit, "cached log gates")
    if "out.cache0.key_shift" in arrays:
        batch = tokens.shape[0]
        close(first.key_tail.reshape(batch, -1), arrays["out.cache0.key_shift"], limit, "key shift state")
        close(
            first.value_tail.reshape(batch, -1), arrays["out.cache0.value_shift"], limit, "value shift state"
        )


def test_golden_folder_has_every_layer_and_model():
    assert (len(LAYERS), len(MODELS)) == (3, 2)


def test_unknown_published_names_are_refused():
    with pytest.raises(ValueError, match="'rotary.inv_freq' is not a weight"):
        attention_params({"rotary.inv_freq": np.zeros(3)}, ForgettingConfig(head_dim=4))
    arrays, _ = load(MODELS[0])
    config = dataclasses.replace(ModelConfig(), num_layers=3)
    with pytest.raises(ValueError, match=r"no model.layers.2"):
        model_params(below(arrays, "param."), config)
