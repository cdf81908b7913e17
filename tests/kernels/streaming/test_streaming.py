"""The public operation: what it refuses, results joined over keys, and eight devices against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kernels.streaming import DotProduct, Mask, merge, streaming_attention
from tests.kernels.contract import Case, packed, relative_error
from tests.kernels.streaming.contract import StreamingContract

q, k, v = jnp.ones((2, 5, 4, 3)), jnp.ones((2, 7, 2, 3)), jnp.ones((2, 7, 2, 6))


class Unhashable(DotProduct):
    __hash__ = None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DotProduct(1.0), q[0], k, v), r"q is float32\[5, 4, 3\], expected Float\[B T H D\]"),
        ((DotProduct(1.0), q, k[:1], v), r"k is float32\[1, 7, 2, 3\], expected Float\[B S K D\] with B=2"),
        ((DotProduct(1.0), q, k, v[:, :5]), r"v is float32\[2, 5, 2, 6\].* S=7"),
        ((DotProduct(1.0), q[:, :, :3], k, v), "H=3 query heads must be a multiple of the K=2"),
        ((DotProduct(1.0), q.astype(jnp.bfloat16), k, v), "share one float dtype; got bfloat16, float32"),
        ((DotProduct(1.0), q, k, v[..., :0]), "every dimension must be at least 1"),
        ((DotProduct(1.0), q, k[..., :2], v), r"k is float32\[2, 7, 2, 2\].* D=3"),
        ((DotProduct(1.0), q, k, v, (), (), (jnp.ones(3),)), r"extras\[0\] is .*, expected a float array \[H=4\]"),
        ((DotProduct(1.0), q, k, v, (), (), (jnp.ones(4, int),)), r"extras\[0\] is int32\[4\]"),
        ((DotProduct(1.0), q, k, v, (jnp.ones((2, 7, 4)),)), r"of_rows\[0\] is .*\[2, 7, 4\], .* \[B=2, T=5, H=4\]"),
        ((DotProduct(1.0), q, k, v, (), (jnp.ones((2, 7, 2)),)), r"of_cols\[0\] is .*, expected .* \[B=2, S=7, H=4\]"),
        ((Unhashable(1.0), q, k, v), "is not hashable"),
        ((lambda x, *rest: x + q[0, :, 0, :1], q, k, v), r"closes over 1 array\(s\), of shapes .* pass them in"),
        ((lambda x, *rest: x.T, q, k, v), r"gives float32\[7, 5\] for 5 queries and 7 keys"),
        ((lambda x, *rest: x.astype(jnp.bfloat16), q, k, v), r"expected float32\[5, 7\]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        streaming_attention(*arguments)


def test_one_output_without_lse():
    assert streaming_attention(DotProduct(1.0), q, k, v, mask=Mask(q_offset=2)).shape == (2, 5, 4, 6)


def test_results_over_parts_of_the_keys_merge_to_the_whole():
    """Values and gradients, with rows that see keys in both parts, in one or in none."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 11, 2, 5)) for key in keys)

    def attend(q, k, v, lengths):
        mask = Mask(causal=False, lengths=lengths)
        return streaming_attention(
            DotProduct(0.4), q, k, v, mask=mask, return_lse=True, implementation="reference"
        )

    def whole(q, k, v):
        return attend(q, k, v, jnp.array([9, 0]))

    def parts(q, k, v):
        first = attend(q, k[:, :4], v[:, :4], jnp.array([4, 0]))
        return merge(*first, *attend(q, k[:, 4:], v[:, 4:], jnp.array([5, 0])))

    def gradients(attend):
        def loss(*operands):
            o, lse = attend(*operands)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0) ** 2), (o, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    got, want = gradients(parts), gradients(whole)
    assert np.all(np.isneginf(got[1][1][1])) and np.all(got[1][0][1] == 0)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(x) | np.isneginf(x)) and relative_error(x, y) < 1e-5


@pytest.mark.parametrize(
    ("shape", "K", "kind"),
    [
        ((1, 4, 1, 2), 2, AxisType.Auto),
        ((2, 2, 1, 2), 1, AxisType.Explicit),
    ],
)
def test_eight_devices_equal_one(shape, K, kind):
    """Also the gradients of the numbers of heads, summed over the devices that share a head, of rows and of keys."""
    rows = packed(21, 21, B=8) | {"starts": np.arange(8, dtype=np.int32)}
    case, contract = Case(21, 21, B=8, H=4, K=K, mask=rows), StreamingContract()
    operands = contract.draw(case, np.float32)
    want = contract.evaluate(case, "reference", operands)
    mesh = Mesh(
        np.array(jax.devices()).reshape(shape), ("data", "fsdp", "sequence", "tensor"), axis_types=(kind,) * 4
    )
    with jax.set_mesh(mesh):
        got = contract.evaluate(case, "blockwise", {n: jnp.asarray(x) for n, x in operands.items()})
    contract.compare(got, want, 1e-5, 1e-5, f"{shape}")
