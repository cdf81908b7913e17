"""Both implementations in float32 against vectors of the official code; the golden checker does float64."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import BlockSizes, Mask, forgetting_attention
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


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_float32(path, implementation):
    compare(path, implementation, jnp.float32, 2e-5)
