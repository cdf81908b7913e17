"""The GPU kernels of streaming attention, simulated: the contract, the blocks they visit, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks, pallas
from kernels.streaming import BlockSizes, DotProduct, Mask, gpu, streaming_attention
from kernels.streaming.gpu_tiles import key_visits, mask_pieces, query_visits, sides
from tests.kernels.contract import packed
from tests.kernels.streaming.contract import CASES, StreamingContract

SMALLEST = {"block_sizes": BlockSizes(16, 16)}


class SimulatedContract(StreamingContract):
    """The contract in blocks of sixteen; what takes long is thorough, and float64 is refused."""

    implementation = "pallas_gpu"
    cases = {name: dataclasses.replace(case, options=case.options | SMALLEST) for name, case in CASES.items()}
    test_in_float64_they_match_to_its_rounding = None

    @pytest.fixture(autouse=True)
    def _simulated(self):
        with pallas.interpreted():
            yield

    @pytest.mark.thorough
    def test_compiled_mapped_rematerialised_and_exported_are_the_same(self):
        super().test_compiled_mapped_rematerialised_and_exported_are_the_same()


class TestGpu(SimulatedContract):
    cases = {name: SimulatedContract.cases[name] for name in ("segments",)}


@pytest.mark.thorough
class TestGpuThoroughly(SimulatedContract):
    cases = {
        **{name: case for name, case in SimulatedContract.cases.items() if name not in TestGpu.cases},
        "own_tiles": dataclasses.replace(CASES["window_without_self"], T=140, S=140),
    }


@pytest.mark.smoke
def test_two_keys_by_hand():
    """Scores ln 3 and 0: weights 3/4 and 1/4, lse = ln 4."""
    q, k, v = jnp.array([[[[np.log(3.0)]]]]), jnp.array([[[[1.0]], [[0.0]]]]), jnp.array([[[[8.0]], [[4.0]]]])
    with pallas.interpreted():
        o, lse = streaming_attention(
            DotProduct(1.0), q, k, v, mask=Mask(causal=False), return_lse=True, implementation="pallas_gpu"
        )
    np.testing.assert_allclose(o[0, 0, 0, 0], 7.0, rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"causal": False}, {"window": 21}, {"causal": False, "lengths": np.array([50, 3])},
        {"starts": np.array([0, 37])}, {"q_offset": 13, "lengths": np.array([60, 41])}, packed(47, 61, 14),
        {"q_offset": 13, "window": 30, "starts": np.array([5, 30])},
    ],
    ids=lambda fields: "_".join(fields) or "causal",
)  # fmt: skip
def test_every_visible_pair_is_visited_and_masked_where_it_must_be(fields):
    """As both kinds of kernel walk: masked blocks on the sides they expect, all pairs visible in the clear ones."""
    T, S, Bq, Bk = 47, 61, 16, 8
    mask = Mask(
        **{n: jnp.asarray(x, jnp.int32) if isinstance(x, np.ndarray) else x for n, x in fields.items()}
    )
    needed, clear = (f(mask, T, S, Bq, Bk) for f in (masks.visible_blocks, masks.clear_blocks))
    dense, pieces = np.asarray(masks.dense(mask, T, S)), mask_pieces(mask, 2, S, (48, 64))
    plan = type("Plan", (), {"causal": mask.causal, "window": mask.window})
    for along_keys, ranges in ((True, key_visits), (False, query_visits)):
        at = sides(plan, pieces, along_keys)
        for b, rows in enumerate(np.asarray(ranges(needed, clear))):
            for block, (first, low, high, end) in enumerate(rows):
                assert first <= low <= high <= end
                masked = [*range(first, low)] * at["left"] + [*range(high, end)] * at["right"]
                visited = np.zeros(dense.shape[1:], bool)
                for other in [*masked, *range(low, high)]:
                    m, n = (block, other) if along_keys else (other, block)
                    pair = np.s_[m * Bq : (m + 1) * Bq, n * Bk : (n + 1) * Bk]
                    visited[pair] = True
                    assert other in masked or dense[b][pair].all()
                line = (
                    np.s_[block * Bq : (block + 1) * Bq]
                    if along_keys
                    else np.s_[:, block * Bk : (block + 1) * Bk]
                )
                assert visited[line][dense[b][line]].all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.thorough)])
def test_gradients_of_half_precision(dtype):
    """Every operand's, against the reference in float32 on the same numbers."""
    contract, case = SimulatedContract(), SimulatedContract.cases["segments"]
    narrow = {name: jnp.asarray(x, dtype) for name, x in contract.draw(case, np.float32).items()}
    wide = {name: x.astype(jnp.float32) for name, x in narrow.items()}
    with pallas.interpreted():
        got = contract.evaluate(case, "pallas_gpu", narrow)
    assert got[1]["q"].dtype == dtype and got[0]["lse"].dtype == jnp.float32
    contract.compare(
        jax.tree.map(np.float32, got), contract.evaluate(case, "reference", wide), 1e-2, 2e-2, "half"
    )


def test_what_is_refused_says_why():
    def run(x, **options):
        return jax.eval_shape(
            functools.partial(streaming_attention, DotProduct(1.0), implementation="pallas_gpu", **options),
            x,
            x,
            x,
        )

    def of(D, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, 64, 1, D), dtype)

    with pallas.compiling_for("cuda"):
        assert run(of(8, jnp.float16)).dtype == jnp.float16
        with pytest.raises(ValueError, match="D=320, Dv=320 do not fit on chip beyond 256"):
            run(of(320))
        with pytest.raises(ValueError, match=r"q=48, k=16 must each be one of \[16, 32, 64, 128\]"):
            run(of(8), block_sizes=BlockSizes(48, 16))
        with jax.enable_x64(True), pytest.raises(ValueError, match="the operands are float64"):
            run(of(8, jnp.float64))


def test_tiles_are_no_larger_than_the_operands_need():
    q, k = jnp.zeros((1, 1, 1, 64)), jnp.zeros((1, 100, 1, 64))
    assert all(tiles.q == 16 and tiles.k <= 128 for tiles in gpu.choose(q, k, k, None, rich=False).values())
