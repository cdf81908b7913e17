"""Both implementations against vectors of the official code (see `meta` in each file for its origin)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import BlockSizes, Mask, acp_delta, acp_end, acp_start, forgetting_attention
from tests.kernels.forgetting.contract import assert_near, jit

FILES = sorted((Path(__file__).parents[2] / "golden" / "forgetting").glob("op_*.npz"))
GRADIENTS = ("q", "k", "v", "log_fgate")


def load(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return arrays, json.loads(str(file["meta"]))


def options(arrays, meta):
    starts = None if meta["seq_start"] is None else jnp.asarray(meta["seq_start"], jnp.int32)
    chosen = {"mask": Mask(q_offset=meta["query_offset"], window=meta.get("window"), starts=starts)}
    if "block_q" in meta:
        chosen["block_sizes"] = BlockSizes(meta["block_q"], meta["block_k"])
        automatic = meta["threshold_mode"] == "auto"
        chosen["acp_threshold"] = "auto" if automatic else jnp.asarray(arrays["in.threshold"])
        if automatic:
            chosen["log_pruning_tolerance"] = meta["log_pruning_tolerance"]
    return chosen


def compare(path, implementation, dtype, bound):
    arrays, meta = load(path)
    inputs = [jnp.asarray(arrays[f"in.{name}"], dtype) for name in GRADIENTS]
    cotangent = jnp.asarray(arrays["cot.o"], dtype)

    def loss(*inputs):
        o, lse = forgetting_attention(*inputs, **options(arrays, meta), scale=meta["sm_scale"],
                                      return_lse=True, implementation=implementation)  # fmt: skip
        return (o * cotangent).sum(), (o, lse)

    gradients, (o, lse) = jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
    assert o.dtype == dtype
    expected_lse = arrays["out.lse"].swapaxes(1, 2)
    expected_lse = np.where(expected_lse <= -1e29, -np.inf, expected_lse)
    assert_near(o, arrays["out.o"], bound, "o")
    assert_near(lse, expected_lse, bound, "lse")
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        assert_near(gradient, arrays[f"grad.{name}"], bound, f"gradient of {name}")


def test_all_files_are_here():
    assert [path.stem for path in FILES] == [
        "op_acp_auto", "op_acp_fixed_offset", "op_causal", "op_extreme_gates", "op_gqa_window", "op_offset_seqstart",
    ]  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_float32(path, implementation):
    compare(path, implementation, jnp.float32, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_float64(path, implementation):
    stored = load(path)[0]["out.o"].dtype
    with jax.enable_x64(True):
        compare(path, implementation, jnp.float64, 1e-11 if stored == np.float64 else 1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["op_acp_auto", "op_acp_fixed_offset"])
def test_pruned_blocks(name):
    arrays, meta = load(FILES[0].with_name(f"{name}.npz"))
    q, k, log_f = (jnp.asarray(arrays[f"in.{n}"]) for n in ("q", "k", "log_fgate"))
    T, S, sizes = meta["T"], meta["S"], (meta["block_q"], meta["block_k"])
    delta = jnp.asarray(arrays["in.threshold"])
    if meta["threshold_mode"] == "auto":
        delta = acp_delta("auto", q, k, scale=meta["sm_scale"], tolerance=meta["log_pruning_tolerance"])
        np.testing.assert_allclose(delta, arrays["in.threshold"], rtol=1e-6)
    if meta["seq_start"] is not None:
        log_f = jnp.where(jnp.arange(S)[:, None] < jnp.asarray(meta["seq_start"])[:, None, None], 0, log_f)
    start = acp_start(log_f, delta, meta["query_offset"], T, *sizes)
    end = acp_end(start, -(-S // sizes[1]))
    np.testing.assert_array_equal(start * sizes[1], arrays["out.start_index"])
    np.testing.assert_array_equal(np.minimum(end * sizes[0], T), arrays["out.end_index"])
    assert start.max() > 0, "the vectors must prune something"
