"""The TPU kernels of linear attention, simulated: the contract, races and unwritten memory, strong decays, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.linear import linear_attention
from kernels.linear.tpu_chunk import channels_gradient, half_sizes, level_table, of_channels
from tests.kernels.contract import Case, packed, relative_error
from tests.kernels.linear.contract import CASES, GIVEN, NUMERATOR, Contract

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


# The others differ in what `lines.py` does, which all implementations share.
SWEPT = ("sixty_three", "packed_state", "later_chunk", "no_denominator", "decay_angle", "key_decay", "value_decay",
         "both_decays", "decay_packed_chunk")  # fmt: skip


class Simulated(Contract):
    implementation = "pallas_tpu"
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


class TestTpu(Simulated):
    cases = {
        "packed": Case(35, 35, H=2, K=1, B=1, mask=packed(35, 35, B=1),
                       options={"decay": "number", "angle": 0.1, "chunk_size": 16, **GIVEN}),
    }  # fmt: skip
    test_bfloat16 = pytest.mark.thorough(Contract.test_bfloat16)
    test_compiled_mapped_rematerialised_and_exported_are_the_same = pytest.mark.thorough(
        Contract.test_compiled_mapped_rematerialised_and_exported_are_the_same
    )


@pytest.mark.thorough
class TestTpuThoroughly(Simulated):
    cases = {name: CASES[name] for name in SWEPT}


MANY = {"many_heads": Case(19, 19, H=12, K=1, B=1, options={"decay": "key", **GIVEN})}


@pytest.mark.thorough
class TestTpuManyHeads(Simulated):
    """More query heads a key/value head than one grid step takes."""

    cases = MANY


STRICT_CASES = {
    "number": Case(35, 35, H=2, K=1, B=1, mask=packed(35, 35, B=1),
                   options={"decay": "number", "angle": 0.1, "chunk_size": 16, **GIVEN}),
    "channels": Case(19, 19, H=2, K=1, B=1, mask=packed(19, 19, B=1),
                     options={"decay": "key value", "chunk_size": 16, **GIVEN, **NUMERATOR}),
}  # fmt: skip


class Strict(Contract):
    cases = STRICT_CASES


@pytest.mark.parametrize("name", ["number", pytest.param("channels", marks=pytest.mark.thorough)])
def test_no_races_no_unwritten_memory_and_nothing_out_of_bounds(name):
    contract, case = Strict(), STRICT_CASES[name]
    with pallas.interpreted(STRICT):
        got = contract.evaluate(case, "pallas_tpu", contract.draw(case, np.float32))
    contract.compare(got, contract.truth(name), 2e-5, 2e-5, "strict")


@pytest.mark.smoke
def test_a_row_of_two_keys():
    x = jnp.arange(1.0, 3).reshape(1, 2, 1, 1)
    with pallas.interpreted():
        num, den = linear_attention(
            x, x, x, log_key_decay=jnp.log(x[..., 0] / 4), implementation="pallas_tpu"
        )
    np.testing.assert_allclose(num[0, :, 0, 0], [1, 8 + 0.5 * 2], rtol=1e-6)
    np.testing.assert_allclose(den[0, :, 0], [1, 4 + 0.5 * 2], rtol=1e-6)


def test_halves_give_every_pair_its_own_sum_of_decays():
    """Also where one decay is a thousand times all others, and its gradient too."""
    C, rng = 16, np.random.default_rng(0)
    g = -rng.uniform(0, 0.1, size=(C, 3)).astype(np.float32)
    g[7] = -80.0

    @jax.jit
    def products(g):
        loss, level = of_channels(g), level_table(C)
        E = jnp.where(level[..., None] == 0, 1.0, 0.0)
        for n in range(len(half_sizes(C))):
            E = jnp.where(level[..., None] == n + 1, loss.levels[n][:, None] * loss.levels[n][None], E)
        return E

    want = np.array([[np.exp(g[b + 1 : a + 1].sum(0, dtype=np.float64)) if a >= b else np.zeros(3)
                      for b in range(C)] for a in range(C)])  # fmt: skip
    np.testing.assert_allclose(products(g), want, rtol=1e-6, atol=1e-30)
    cotangent = rng.normal(size=(C, C, 3))
    of_level = [
        sum(np.where(level_table(C)[..., None] == n + 1, want * cotangent, 0).sum(axis) for axis in (0, 1))
        for n in range(len(half_sizes(C)))
    ]
    zero = jnp.zeros((C, 3))
    found = jax.jit(channels_gradient)(zero, zero, [jnp.asarray(x, jnp.float32) for x in of_level])
    pairs = want * cotangent
    expected = np.array([pairs[l:, :l].sum((0, 1)) for l in range(C)])
    assert relative_error(found, expected) < 1e-6
    assert np.all(np.asarray(found)[0] == 0)


def test_what_is_refused_says_why():
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)

    def run(x, **options):
        return linear_attention(x, x, x, implementation="pallas_tpu", **options)

    with pytest.raises(ValueError, match="it is compiled for tpu and this is cpu"):
        jax.eval_shape(run, x)
    with pallas.compiling_for("tpu"):
        with pytest.raises(ValueError, match="no dense `allowed` matrix"):
            jax.eval_shape(lambda x: run(x, allowed=jnp.ones((1, 4, 4), bool)), x)
        wide = jax.ShapeDtypeStruct((1, 4, 1, 512), jnp.float32)
        with pytest.raises(ValueError, match="a state of 1 x D=512 x Dv=512 numbers passes the 131072"):
            jax.eval_shape(run, wide)
        with pytest.raises(ValueError, match="with 1 x D=8 and Dv=512 pass 256 channels"):
            jax.eval_shape(lambda x, v: linear_attention(x, x, v, log_value_decay=v, denominator=False,
                                                         implementation="pallas_tpu"), x, wide)  # fmt: skip
        with jax.enable_x64(True), pytest.raises(ValueError, match="float64 is not a TPU's"):
            jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float64))
