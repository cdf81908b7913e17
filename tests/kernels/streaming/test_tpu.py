"""The TPU kernels of streaming attention, simulated: the contract with a score that uses everything a score may use,
races and unwritten memory, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import pallas
from kernels.streaming import BlockSizes, DotProduct, Mask, streaming_attention, tpu_forward, tpu_plan
from tests.kernels.contract import Case, packed
from tests.kernels.streaming.contract import CASES, StreamingContract

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


class Simulated(StreamingContract):
    implementation = "pallas_tpu"
    test_in_float64_they_match_to_its_rounding = None  # refused

    @pytest.fixture(autouse=True)
    def simulated(self):
        with pallas.interpreted():
            yield


class TestTpu(Simulated):
    """A packed row of grouped heads; the rest of the contract is thorough."""

    cases = {"segments": CASES["segments"]}
    test_compiled_mapped_rematerialised_and_exported_are_the_same = None
    test_numpy_operands_and_implementation_names = None


@pytest.mark.thorough
class TestTpuThoroughly(Simulated):
    cases = {name: case for name, case in CASES.items() if name not in TestTpu.cases}


class Strict(StreamingContract):
    implementation = "pallas_tpu"
    cases = {
        "grouped": Case(13, 21, B=1, K=1, mask=packed(13, 21, 8, B=1), options={"block_sizes": BlockSizes(8, 8)}),
        "all_keys": Case(19, 11, B=1, K=1, mask={"causal": False}, options={"block_sizes": BlockSizes(8, 4)}),
    }  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", Strict.cases)
def test_no_races_no_unwritten_memory_and_nothing_out_of_bounds(name):
    contract, case = Strict(), Strict.cases[name]
    with pallas.interpreted(STRICT):
        got = contract.evaluate(case, "pallas_tpu", contract.draw(case, np.float32))
    contract.compare(got, contract.truth(name), 3e-5, 3e-5, "strict")


@pytest.mark.smoke
def test_a_row_of_two_keys():
    x = jnp.arange(1.0, 3).reshape(1, 2, 1, 1)
    with pallas.interpreted():
        o = streaming_attention(DotProduct(1.0), x, x, x, implementation="pallas_tpu")
    np.testing.assert_allclose(o[0, :, 0, 0], [1, 1 + 1 / (1 + np.exp(2 - 4))], rtol=1e-6)


@pytest.mark.thorough
def test_several_fetches_give_what_one_gives(monkeypatch):
    """One block a fetch, two, and all: of keys in the forward pass and dq, of queries in dk and dv."""
    case, found = CASES["segments"], []
    contract = Simulated()
    for bytes_a_fetch in (1, 2 * 16 * 512, 1 << 20):
        monkeypatch.setattr(tpu_plan, "FETCH_BYTES", bytes_a_fetch)
        with pallas.interpreted():
            found.append(contract.evaluate(case, "pallas_tpu", contract.draw(case, np.float32)))
    for each in found[:2]:
        contract.compare(each, jax.tree.map(np.asarray, found[2]), 1e-6, 1e-6, "fetches")


def test_a_block_of_several_pieces_gives_what_one_gives(monkeypatch):
    """Packed rows and a window, blocks of 24 keys in pieces of 8: masked and clear blocks, all offsets in them."""
    q, k, v = (np.random.default_rng(n).normal(size=(1, 71, 1, 8)).astype(np.float32) for n in range(3))
    segments = jnp.asarray(np.arange(71) // 50 + 1)[None]
    masks = [Mask(window=53), Mask(q_segments=segments, kv_segments=segments)]

    def run(implementation, mask):
        return streaming_attention(
            DotProduct(0.4), q, k, v, mask=mask, implementation=implementation, block_sizes=BlockSizes(8, 24)
        )

    expected = [run("reference", mask) for mask in masks]
    monkeypatch.setattr(tpu_forward, "PIECE", 8)
    assert tpu_forward.pieces(24) == 3 and tpu_forward.pieces(20) == 1
    with pallas.interpreted():
        found = [run("pallas_tpu", mask) for mask in masks]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def test_float64_is_refused():
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float64)
    with (
        jax.enable_x64(True),
        pallas.compiling_for("tpu"),
        pytest.raises(ValueError, match="no float64; cast"),
    ):
        jax.eval_shape(
            lambda x: streaming_attention(DotProduct(1.0), x, x, x, implementation="pallas_tpu"), x
        )
