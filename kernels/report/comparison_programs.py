"""The attentions compared: ours with and without gates, pruned or not, and JAX's splash and flash attention for TPU.

T queries and keys, H query heads, K key/value heads, G = H / K; causal, bfloat16. Heads are alike, so programs have two
heads, or one group.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from kernels import masks
from kernels.forgetting import BlockSizes, Mask, forgetting_attention, pruning
from kernels.report.comparison_cycles import Counts
from kernels.streaming import tpu_forward, tpu_plan
from kernels.streaming.scores import DotProduct

HIDDEN = 2048  # the width of the model: D times the heads


class Shape(NamedTuple):
    """T queries and keys, H query heads on K key/value heads, what is counted and what is compiled for."""

    T: int
    D: int
    H: int = 2
    K: int = 2
    pruned: bool = False
    target: str = "v5e"


def counts_of_ours(shape: Shape) -> tuple[dict[str, Counts], float]:
    """Of our kernels with gates "forward", "backward_q", "backward_kv"; and the visited share of the causal blocks."""
    x, mask, sizes, kept = _array(shape), Mask(), sizes_of(shape), None
    geometry = mask, shape.T, shape.T, *sizes
    seen, clear = masks.visible_blocks(*geometry)[:, None], masks.clear_blocks(*geometry)[:, None]
    below = int(seen.sum())
    if shape.pruned:
        kept = _kept(shape.T, shape.D, *sizes)
        seen, clear = seen & kept, clear & kept
    plan, _ = tpu_plan.make(DotProduct(1.0), mask, x, x, x, BlockSizes(*sizes), False)
    nq, nk = (-(-shape.T // size) for size in sizes)
    of_keys, of_queries = -(-nk // plan.keys_a_fetch), -(-nq // plan.queries_a_fetch)
    seen, clear = (np.asarray(blocks).reshape(-1, nq, nk) for blocks in (seen, seen & clear))
    groups = shape.H // shape.K
    if groups > 1 and of_queries > 1:
        raise ValueError(f"groups of {groups} with {of_queries} fetches a key block: starts of both kinds")
    pieces = tpu_forward.pieces(sizes[1])
    query = {n: Counts(nq * of_keys, nq, **_rounds(seen, clear, plan.keys_a_fetch, n)) for n in (pieces, 1)}
    # Sums for the gates start and end with each head, dk and dv with each group.
    parts = 2 if groups == 1 else 1
    turned = (blocks.swapaxes(1, 2) for blocks in (seen, clear))
    key = Counts(nk * of_queries, nk / groups, parts=parts, **_rounds(*turned, plan.queries_a_fetch, 1))
    found = {"forward": query[pieces], "backward_q": query[1], "backward_kv": key}
    return found, int(seen.sum()) / len(seen) / below


def _rounds(seen, clear, a_fetch, pieces):
    """Of blocks [heads, n, visited], in fetches of `a_fetch`: rounds of the two loops and walks, of a head."""
    filling = [(0, 0), (0, 0), (0, -seen.shape[2] % a_fetch)]
    total, free = (
        np.pad(x, filling).reshape(*x.shape[:2], -1, a_fetch).sum(-1) * pieces for x in (seen, clear)
    )
    visited, first = total > 0, np.maximum(total - free, 1)  # one piece comes before the loops
    rounds = {"masked": first - 1, "clear": total - first, "walks": 1}
    return {name: int(np.where(visited, n, 0).sum()) / len(seen) for name, n in rounds.items()}


def counts_of_steps(shape: Shape, block: int) -> tuple[Counts, Counts]:
    """Of JAX's kernels with blocks of `block`: forward and dq, then dk and dv."""
    n = filled(shape.T) // block
    diagonal = Counts(n * n, n, n, n * (n - 1) // 2)
    return diagonal, diagonal._replace(ends=n * shape.K / shape.H)


def ours(shape: Shape, gated: bool) -> tuple[Callable, tuple]:
    """Our attention, and the shapes of its operands."""
    threshold = "auto" if shape.pruned else None

    def run(q, k, v, log_f=None):
        return forgetting_attention(q, k, v, log_f, acp_threshold=threshold, implementation="pallas_tpu")

    q, kv = _array(shape), _array(shape._replace(H=shape.K))
    return run, (q, kv, kv, *[jax.ShapeDtypeStruct((1, shape.T, shape.H), jnp.float32)] * gated)


def splash(shape: Shape, block: int) -> tuple[Callable, tuple]:
    """JAX's, with every block size `block`; T a multiple of it."""
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash_kernel.BlockSizes(**{f"block_{name}": block for name in names})
    causal = splash_mask.MultiHeadMask([splash_mask.CausalMask((shape.T, shape.T))] * shape.H)
    make = splash_kernel.make_splash_mha if shape.K > 1 else splash_kernel.make_splash_mqa
    heads = (shape.K,) if shape.K > 1 else ()
    q, kv = (jax.ShapeDtypeStruct((1, *h, shape.T, shape.D), jnp.bfloat16) for h in ((shape.H,), heads))
    return jax.vmap(make(causal, block_sizes=sizes, head_shards=1, q_seq_shards=1)), (q, kv, kv)


def flash(shape: Shape, block: int) -> tuple[Callable, tuple]:
    """JAX's, likewise."""
    names = [
        "q",
        "k_major",
        "k",
        "q_major_dkv",
        "k_major_dkv",
        "k_dkv",
        "q_dkv",
        "k_major_dq",
        "k_dq",
        "q_dq",
    ]
    sizes = flash_attention.BlockSizes(block_b=1, **{f"block_{name}": block for name in names})
    x = jax.ShapeDtypeStruct((1, shape.H, shape.T, shape.D), jnp.bfloat16)
    run = functools.partial(
        flash_attention.flash_attention, causal=True, sm_scale=shape.D**-0.5, block_sizes=sizes
    )
    return run, (x, x, x)


def sizes_of(shape: Shape) -> tuple[int, int]:
    """Queries and keys in a block of our kernels."""
    sizes = tpu_plan.choose(shape.T, shape.T, jnp.bfloat16)
    return sizes.q, sizes.k


def filled(T: int) -> int:
    """The next length that JAX's kernels take."""
    return -(-T // 128) * 128


def blocks_of(T: int) -> list[int]:
    """Block sizes tried of JAX's kernels, the smaller one first."""
    return sorted({min(filled(T), 512), min(filled(T), 1024)})


def _array(shape):
    return jax.ShapeDtypeStruct((1, shape.T, shape.H, shape.D), jnp.bfloat16)


def _kept(T, D, block_q, block_k, seed=0):
    """Blocks kept by the automatic threshold: gate logits N(2, 1), queries and keys of norm sqrt(D) (QK-norm)."""
    random, heads = np.random.default_rng(seed), HIDDEN // D
    q, k = (random.normal(size=(1, T, heads, D)).astype(np.float32) for _ in range(2))
    q, k = (x * np.sqrt(D) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    log_f = -np.log1p(np.exp(-random.normal(2, 1, size=(1, T, heads)))).astype(np.float32)
    delta = pruning.acp_delta("auto", q, k, scale=D**-0.5)
    start = pruning.acp_start(jnp.asarray(log_f), delta, 0, T, block_q, block_k)
    return pruning.kept_blocks(start, -(-T // block_k))
