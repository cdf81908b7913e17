"""Token MLPs, MixiT and FNet: the shared contract, and their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.mixer import find_mixer
from attnlab.attention.position_mixing import channel_transform, fourier_mixing, mixit_map, noise, token_mlp
from attnlab.attention.synthesizer import synth_random
from kernels.masks import Mask
from tests.attention.contract import C, apply, build, inputs, variants
from tests.attention.test_controls import FrozenContract, LightContract

N = 41


@variants(gated={"max_length": N, "num_heads": 4, "num_kv_heads": 2, "gate": True})
class TestTokenMLP(LightContract):
    name = "token_mlp"


@variants(sink={"max_length": N, "num_heads": 4, "num_kv_heads": 2, "sink_head0": True, "noise_width": 3.0})
class TestMixIT(LightContract):
    name = "mixit"


@variants(plain={"max_length": N})
class TestFNet(FrozenContract):
    name = "fnet"


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_token_mlp_with_the_weights_of_a_softmax_is_the_random_synthesizer():
    table, v = draw(2, N, N), draw(3, 13, 2, 5, seed=1)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((N, N), bool)), table, -jnp.inf), axis=-1)
    np.testing.assert_allclose(token_mlp(weights, None, v), synth_random(table, v), atol=2e-6)
    bias = draw(2, N, seed=2)
    shift = token_mlp(weights, bias, v) - token_mlp(weights, None, v)
    np.testing.assert_allclose(
        shift, jnp.broadcast_to(bias[:, :13].T[None, ..., None], shift.shape), atol=2e-6
    )


def test_rows_that_see_nothing_have_no_bias_either():
    segments = jnp.array([[0, 0, 1, 1, 1]])
    mask = Mask(q_segments=segments, kv_segments=segments)
    o = token_mlp(draw(2, 9, 9), jnp.ones((2, 9)), draw(1, 5, 2, 3), mask=mask)
    assert not o[0, :2].any() and np.all(np.asarray(o[0, 2:]) != 0)


def test_token_mlp_starts_as_its_papers_do():
    plain, gated = (build("token_mlp", max_length=100, gate=gate)[1]["params"] for gate in (False, True))
    assert abs(float(jnp.std(plain["mixing"])) * 100**0.5 - 1) < 0.05 and not plain["mixing_bias"].any()
    assert abs(float(jnp.std(gated["mixing"])) / 1e-3 - 1) < 0.05 and np.all(gated["mixing_bias"] == 1)


def test_the_gate_multiplies():
    module, params = build("token_mlp", max_length=N, gate=True)
    weights = dict(params["params"], gate={"kernel": jnp.zeros_like(params["params"]["gate"]["kernel"])})
    assert not apply(module, {"params": weights}, inputs()).any()  # silu(0) = 0


def test_the_map_of_mixit():
    given = draw(3, 9, 9)
    n, one = np.tril(given), np.eye(9)
    mean = n.sum(-1, keepdims=True) / np.arange(1, 10)[:, None]
    np.testing.assert_allclose(mixit_map(given), np.tril(one + n - mean), atol=1e-6)
    rows = mixit_map(given, add_identity=False, scale=0.5)
    np.testing.assert_allclose(rows, 0.5 * np.tril(n - mean), atol=1e-6)
    np.testing.assert_allclose(rows.sum(-1), 0, atol=1e-6)  # what is added to the identity moves no mass
    sunk = mixit_map(given, sink_head0=True)
    np.testing.assert_allclose(sunk[0], 0.5 * one + 0.5 * (np.arange(9) == 0), atol=1e-6)
    np.testing.assert_array_equal(sunk[1:], mixit_map(given)[1:])
    np.testing.assert_allclose(mixit_map(given)[:, :5, :5], mixit_map(given[:, :5, :5]), atol=1e-6)


def test_the_noise_of_mixit_is_prefix_stable_and_as_wide_as_asked():
    def drawn(length, std=0.0, width=0.0):
        return jax.jit(lambda: noise(std, width)(jax.random.key(1), (64, length, length)))()

    short, long = drawn(9), drawn(36)
    np.testing.assert_allclose(short * 9**0.5, long[:, :9, :9] * 6, rtol=1e-5)
    np.testing.assert_allclose(drawn(9, std=0.5), 0.5 * short * 3, rtol=1e-5)
    spread = np.std(drawn(36, width=9.0), axis=(1, 2)) * 6  # of heads, over N^-1/2: uniform on [1/3, 1]
    assert 0.28 < spread.min() < 0.45 and 0.85 < spread.max() < 1.1


def test_the_last_causal_row_of_fnet_is_that_of_the_whole_transform():
    x = inputs()
    S = x.shape[1]
    whole = jnp.fft.fft2(x, norm="ortho").real
    transformed = channel_transform(x)
    got = fourier_mixing(transformed, period=S, row="N", mask=Mask(causal=False))
    np.testing.assert_allclose(got, whole, atol=1e-5)
    causal = fourier_mixing(transformed, period=S, row="N")
    np.testing.assert_allclose(causal[:, -1], whole[:, -1], atol=1e-5)
    assert np.abs(causal[:, 5] - whole[:, 5]).max() > 0.1
    by_row = fourier_mixing(transformed, period=S, row="t")
    factor = jnp.sqrt(S / jnp.arange(1, S + 1))[:, None]
    np.testing.assert_allclose(by_row, causal * factor, atol=1e-5)


def test_phases_stay_exact_at_large_positions():
    """Row and key near 40,000: their product in float32 would be wrong by whole turns."""
    period, at = 40_009, jnp.array([[39_998, 40_001, 40_007]])
    x = draw(1, 3, 4)
    got = fourier_mixing(channel_transform(x), period=period, row="N", q_positions=at, kv_positions=at)
    t = np.array(at[0], np.float64)
    angle = 2 * np.pi * (np.outer(np.array(at[0], np.int64), np.array(at[0], np.int64)) % period) / period
    weights = np.tril(np.ones((3, 3))) * np.exp(-1j * angle)
    want = (weights @ np.fft.fft(np.asarray(x[0], np.float64), norm="ortho")).real / period**0.5
    np.testing.assert_allclose(got[0], want, atol=1e-6 * np.abs(want).max() + 1e-7)
    assert t.max() ** 2 < 2**31


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fnet", {"row": "k"}, "row='k' is unknown"),
        ("fnet", {"max_length": 50_000}, "max_length=50000 exceeds 46340"),
        ("fnet", {"channels": 8}, "channels=8 must be hidden_size=22"),
        ("mixit", {"noise_std": -1.0}, "noise_std=-1.0 must not be negative"),
        ("mixit", {"noise_width": 0.5}, "noise_width=0.5 be 0 or at least 1"),
        ("mixit", {"noise_std": 0.1, "noise_width": 2.0}, "both set the noise"),
    ],
)
def test_bad_options_are_refused_with_their_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_mixer(name).Config(**options).resolve(2, 0, 10, C)


def test_fourier_mixing_refuses_unknown_rows_and_periods():
    with pytest.raises(ValueError, match="row='k' is unknown"):
        fourier_mixing(channel_transform(inputs()), period=30, row="k")
    with pytest.raises(ValueError, match="period=46341 is outside"):
        fourier_mixing(channel_transform(inputs()), period=46_341)
