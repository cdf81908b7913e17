"""Converted Llama and Qwen models: the same logits while the windows see everything, and slots once they do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.models.language_model import LanguageModel
from attnlab.models.llama_to_native_hybrid import gates_from_keys, native_hybrid_config, native_hybrid_params

C, H, K, D, I, V, L, T = 12, 4, 2, 6, 20, 17, 4, 13
PUBLISHED = {
    "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D,
    "intermediate_size": I, "vocab_size": V, "rope_theta": 500.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def published_weights(kind, tied=False):
    rng = np.random.default_rng(0)

    def linear(out, inner):
        return rng.normal(size=(out, inner)) * 0.4

    weights = {"model.embed_tokens.weight": linear(V, C), "model.norm.weight": 1 + linear(C, 1)[:, 0]}
    if not tied:
        weights["lm_head.weight"] = linear(V, C)
    for i in range(L):
        below = f"model.layers.{i}."
        for name, heads in (("q", H), ("k", K), ("v", K)):
            weights[f"{below}self_attn.{name}_proj.weight"] = linear(heads * D, C)
            if kind == "qwen2":
                weights[f"{below}self_attn.{name}_proj.bias"] = linear(heads * D, 1)[:, 0]
            if kind == "qwen3" and name != "v":
                weights[f"{below}self_attn.{name}_norm.weight"] = 1 + linear(D, 1)[:, 0]
        weights[f"{below}self_attn.o_proj.weight"] = linear(C, H * D)
        for name, shape in (("gate", (I, C)), ("up", (I, C)), ("down", (C, I))):
            weights[f"{below}mlp.{name}_proj.weight"] = linear(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{below}{name}.weight"] = 1 + linear(C, 1)[:, 0]
    return weights


def published_model(w, tokens):
    """The pretrained model written out: logits [T, V] of one sequence."""

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * weight

    angle = np.arange(T)[:, None] * 500.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotate(x):
        return x * cos + np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(L):
        p = {
            k.removeprefix(f"model.layers.{i}."): a
            for k, a in w.items()
            if k.startswith(f"model.layers.{i}.")
        }
        h, heads = norm(x, p["input_layernorm.weight"]), {}
        for name, count in (("q", H), ("k", K), ("v", K)):
            y = h @ p[f"self_attn.{name}_proj.weight"].T + p.get(f"self_attn.{name}_proj.bias", 0)
            heads[name] = y.reshape(T, count, D)
            if f"self_attn.{name}_norm.weight" in p:
                heads[name] = norm(heads[name], p[f"self_attn.{name}_norm.weight"])
        k, v = (np.repeat(heads[name], H // K, 1) for name in "kv")
        s = np.einsum("thd,shd->hts", rotate(heads["q"]), rotate(k)) / np.sqrt(D)
        s = np.exp(np.where(np.tril(np.ones((T, T), bool)), s, -np.inf))
        o = np.einsum("hts,shd->thd", s / s.sum(-1, keepdims=True), v).reshape(T, H * D)
        x = x + o @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate, up = (h @ p[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


@pytest.mark.parametrize(
    ("kind", "tied", "scanned"), [("llama", False, True), ("qwen2", True, False), ("qwen3", False, True)]
)
def test_full_windows_reproduce_the_pretrained_logits(kind, tied, scanned):
    weights = published_weights(kind, tied)
    published = PUBLISHED | {"model_type": kind, "tie_word_embeddings": tied}
    changes = {"scan_layers": scanned, "dtype": "float64"}
    tokens = np.random.default_rng(1).integers(V, size=T)
    want = published_model(weights, tokens)
    with jax.enable_x64(True):

        def logits(**options):
            config = native_hybrid_config(published, slots=3, every=2, full=T, **options, **changes)
            params = {"params": jax.tree.map(jnp.asarray, native_hybrid_params(weights, config))}
            return jax.jit(LanguageModel(config).apply)(params, jnp.asarray(tokens)[None])[0]

        np.testing.assert_allclose(logits(window=T, empty_slots="mask"), want, atol=1e-11)
        if scanned and kind == "llama":
            hybrid = logits(window=4, empty_slots="mask")
            np.testing.assert_allclose(hybrid[:4], want[:4], atol=1e-11)  # nothing has left the window yet
            assert np.abs(hybrid[4:] - want[4:]).max() > 1e-2


def test_gates_start_from_keys():
    key = np.arange(2 * 4 * 3.0).reshape(8, 3)  # two heads of four
    halves = gates_from_keys(key, 2, 2)
    np.testing.assert_array_equal(halves[0], (key[0] + key[1]) / 2)
    np.testing.assert_array_equal(halves[3], (key[6] + key[7]) / 2)
    np.testing.assert_array_equal(gates_from_keys(key, 2, 4), key)
    tiled = gates_from_keys(key, 2, 8)
    np.testing.assert_array_equal(tiled[[0, 4, 8, 12]], key[[0, 0, 4, 4]])
    with pytest.raises(ValueError, match="slots=3 and the head size 4 do not divide each other"):
        gates_from_keys(key, 2, 3)


def test_parameters_are_those_of_a_fresh_model_in_both_layouts():
    published = PUBLISHED | {"model_type": "llama"}
    for scanned in (True, False):
        config = native_hybrid_config(published, slots=3, every=2, scan_layers=scanned)
        params = native_hybrid_params(published_weights("llama"), config, gates="zero")
        fresh = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
            "params"
        ]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
        blocks = params["layers"] if scanned else params["layers_1"]
        assert not blocks["blocks_1"]["mixer"]["forget_gate"]["kernel"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' cannot be converted"),
        (
            {"rope_scaling": {"factor": 8.0}},
            "rope_scaling={'factor': 8.0} cannot be converted; only None can",
        ),
        ({"attention_bias": True}, "attention_bias=True cannot be converted"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be converted; only 'silu' can"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096 cannot be converted"),
    ],
)
def test_models_that_cannot_be_expressed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        native_hybrid_config(PUBLISHED | {"model_type": "llama"} | changes)


def test_wrong_weights_are_refused():
    config = native_hybrid_config(PUBLISHED | {"model_type": "llama"}, slots=3, every=2)
    weights = published_weights("llama")
    with pytest.raises(ValueError, match="gates='random' is unknown"):
        native_hybrid_params(weights, config, gates="random")
    with pytest.raises(ValueError, match="'mlp.experts.0.weight' is not a weight"):
        native_hybrid_params(weights | {"model.layers.0.mlp.experts.0.weight": np.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"no model.layers.4\.\*; check num_layers"):
        native_hybrid_params(weights, dataclasses.replace(config, num_layers=6))
    with pytest.raises(ValueError, match="to native_hybrid layers only, not to 'softmax'"):
        native_hybrid_params(weights, dataclasses.replace(config, layers="softmax"))
