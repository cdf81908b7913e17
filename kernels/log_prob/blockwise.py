"""Log-probabilities in blocks of rows and vocabulary, pure JAX, with the backward pass that recomputes the logits.

Letters: N rows, D hidden size, V vocabulary; a block has R rows and C tokens. The last block of an axis that its size
does not divide begins earlier, and what it has in common with the one before counts once. Nothing is padded or copied.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from kernels.log_prob import statistics
from kernels.log_prob.arguments import (
    LOWEST,
    BlockSizes,
    Kernel,
    RowGradients,
    Shard,
    Statistics,
    logit_gradient,
)

ROWS, TOKENS = 512, 1024  # of a block, measured on a CPU at N = 1024 and 4096, V = 320 to 50k, D = 160 to 512
WHOLE = 2048  # vocabularies up to this are one block


def default_block_sizes(vocab: int) -> BlockSizes:
    """One block for a small vocabulary: a loop over a few hundred tokens costs more than it saves."""
    return BlockSizes(ROWS, vocab if vocab <= WHOLE else TOKENS)


def forward(shard: Shard) -> Statistics:
    """The statistics of all rows."""
    rows, tokens = _sizes(shard)

    def of_rows(start):
        h, labels = (jax.lax.dynamic_slice_in_dim(x, start[0], rows.size) for x in (shard.h, shard.labels))

        def block(carry, at):
            x, columns, local, _ = _logits(shard, h, labels, at, tokens)
            inside = (local >= 0) & (local < tokens.size) & (labels >= at[1])
            y = jnp.take_along_axis(x, jnp.where(inside, local, 0)[:, None], axis=1)[:, 0]
            return statistics.extend(carry, x, jnp.where(inside, y, 0), columns, axis=1), None

        return _scan(block, statistics.empty((rows.size,), shard.accumulator, shard.options), tokens)[0]

    if rows.count == 1:
        return of_rows((0, 0))
    stacked = jax.lax.map(of_rows, rows.starts)
    return jax.tree.map(rows.join, stacked)


def backward(shard: Shard, gradients: RowGradients) -> tuple[jax.Array, jax.Array]:
    """dh [N, D] and dw like w: for each block of tokens over all rows, so that logits are recomputed once."""
    rows, tokens = _sizes(shard)
    axis, wide = shard.options.vocab_axis, shard.accumulator

    def of_tokens(carry, at):
        def of_rows(carry, start):
            dh, dw = carry
            part = partial(jax.lax.dynamic_slice_in_dim, start_index=start[0], slice_size=rows.size)
            h, labels = part(shard.h), part(shard.labels)
            x, columns, _, w = _logits(shard, h, labels, at, tokens)
            of = jax.tree.map(lambda row: part(row)[:, None], gradients)
            dx = logit_gradient(x, columns == labels[:, None], of) * shard.options.slope(x)
            dx = _once(dx, start, rows, 0, _once(dx, at, tokens, 1, dx)).astype(shard.h.dtype)
            dw += _product("rc,rd->dc" if axis else "rc,rd->cd", dx, h)
            return (_add(dh, _product("rc,dc->rd" if axis else "rc,cd->rd", dx, w), start[0], 0), dw), None

        dh, dw = carry
        shape = (shard.w.shape[0], tokens.size) if axis else (tokens.size, shard.w.shape[1])
        (dh, part), _ = _scan(of_rows, (dh, jnp.zeros(shape, wide)), rows)
        return (dh, _add(dw, part, at[0], axis)), None

    carry = jnp.zeros(shard.h.shape, wide), jnp.zeros(shard.w.shape, wide)
    return _scan(of_tokens, carry, tokens)[0]


KERNEL = Kernel(forward, backward)


class _Cut:
    """`total` items in `count` blocks of `size`; starts [count, 2]: where a block begins, and its first new item."""

    def __init__(self, total: int, size: int):
        self.total, self.size = total, min(size, total)
        self.count = math.ceil(total / self.size)
        new = jnp.arange(self.count, dtype=jnp.int32) * self.size
        self.starts = jnp.stack([jnp.minimum(new, total - self.size), new], axis=1)

    def join(self, stacked):
        """[count, size] -> [total]."""
        new = self.total - (self.count - 1) * self.size
        return jnp.concatenate([stacked[:-1].reshape(-1), stacked[-1, self.size - new :]])


def _sizes(shard) -> tuple[_Cut, _Cut]:
    sizes = shard.options.block_sizes or default_block_sizes(shard.vocab)
    return _Cut(shard.h.shape[0], sizes.rows), _Cut(shard.vocab, sizes.vocab)


def _logits(shard, h, labels, at, tokens):
    """x [R, C] of rows h, LOWEST at tokens counted before; the columns' numbers [1, C]; labels in the block [R]; w."""
    axis = shard.options.vocab_axis
    w = jax.lax.dynamic_slice_in_dim(shard.w, at[0], tokens.size, axis)
    x = shard.options.logits(_product("rd,dc->rc" if axis else "rd,cd->rc", h, w))
    columns = at[0] + jnp.arange(tokens.size, dtype=jnp.int32)[None]
    return _once(x, at, tokens, 1, x, LOWEST), columns, labels - at[0], w


def _once(like, at, cut, axis, x, fill=0):
    """x, and `fill` for the items that the block has in common with the one before."""
    if cut.total % cut.size == 0:
        return x
    return jnp.where(at[0] + jax.lax.broadcasted_iota(jnp.int32, like.shape, axis) >= at[1], x, fill)


def _add(x, part, start, axis):
    size = part.shape[axis]
    if size == x.shape[axis]:
        return x + part
    sum_ = jax.lax.dynamic_slice_in_dim(x, start, size, axis) + part
    return jax.lax.dynamic_update_slice_in_dim(x, sum_, start, axis)


def _scan(step, carry, cut):
    """`lax.scan` over the blocks of a cut, without a loop where there is only one."""
    return step(carry, (0, 0)) if cut.count == 1 else jax.lax.scan(step, carry, cut.starts)


def _product(equation, a, b):
    wide = jnp.promote_types(jnp.float32, a.dtype)
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=wide)
