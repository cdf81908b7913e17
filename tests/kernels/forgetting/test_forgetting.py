"""The public operation: properties of the mathematics, defaults, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting import BlockSizes, Mask, forgetting_attention
from tests.kernels.forgetting.contract import assert_near, jit

BOTH = pytest.mark.parametrize("implementation", ["reference", "blockwise"])
SIZES = BlockSizes(8, 8)
B, T, H, D = 2, 23, 2, 5


def drawn(seed=0):
    r = np.random.default_rng(seed)
    q, k, v, do = (r.normal(size=(B, T, H, D)).astype(np.float32) for _ in range(4))
    return q, k, v, -np.log1p(np.exp(-r.normal(size=(B, T, H)))).astype(np.float32), do


def biased_softmax(q, k, v, bias, blocked=None):
    """Ordinary causal attention with an additive bias [B, H, T, S], written with jax.nn.softmax."""
    s = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5 + bias
    seen = np.tri(T, dtype=bool) if blocked is None else np.tri(T, dtype=bool) & ~blocked
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), v)


@BOTH
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_constant_gates_are_linear_biases(implementation, slope):
    """log_f = -m_h gives the bias -m_h (i - j); log_f = 0 gives plain attention. Output and gradients."""
    q, k, v, _, do = drawn()
    slopes = slope * np.arange(1, H + 1, dtype=np.float32)
    i = np.arange(T, dtype=np.float32)
    bias = -slopes[:, None, None] * (i[:, None] - i)

    def ours(q, k, v):
        log_f = jnp.broadcast_to(-slopes, (B, T, H))
        o = forgetting_attention(q, k, v, log_f, block_sizes=SIZES, implementation=implementation)
        return (o * do).sum(), o

    def plain(q, k, v):
        o = biased_softmax(q, k, v, bias)
        return (o * do).sum(), o

    actual, expected = (jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (ours, plain))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_near(x, y, 1e-5, implementation)


@BOTH
def test_closed_gates_cut_the_past(implementation):
    """Gates of e^-10000 everywhere leave o_i = v_i; at some places they split attention there, as segments do."""
    q, k, v, log_f, _ = drawn()
    cut = log_f.copy()
    cut[:, [5, 16]] = -1e4
    segments = jnp.asarray(np.searchsorted([5, 16], np.arange(T), side="right") + 1)[None].repeat(B, 0)

    @jit
    def run(log_f, mask):
        return forgetting_attention(
            q, k, v, log_f, mask=mask, block_sizes=SIZES, implementation=implementation
        )

    np.testing.assert_array_equal(run(np.full_like(log_f, -1e4), Mask()), v)
    assert_near(run(cut, Mask()), run(log_f, Mask(q_segments=segments, kv_segments=segments)), 1e-5, "o")


@BOTH
def test_a_constant_added_to_a_row_moves_only_its_lse(implementation):
    """All keys agree in channel 0, so a query that grows along it adds the same to each of its scores."""
    q, k, v, log_f, do = drawn()
    k[..., 0] = 1.0
    moved = q.copy()
    moved[..., 0] += 3.0 * D**0.5

    def loss(q, v, log_f):
        o, lse = forgetting_attention(
            q, k, v, log_f, block_sizes=SIZES, implementation=implementation, return_lse=True
        )
        return (o * do).sum(), (o, lse)

    run = jit(jax.grad(loss, argnums=(1, 2), has_aux=True))
    (gradients, (o, lse)), (other, (same_o, shifted)) = run(q, v, log_f), run(moved, v, log_f)
    assert_near(same_o, o, 1e-5, "o")
    assert_near(shifted, lse + 3.0, 1e-5, "lse")
    for x, y in zip(other, gradients, strict=True):
        assert_near(x, y, 2e-5, "gradient")


@BOTH
def test_left_padded_rows_equal_the_unpadded_run(implementation):
    q, k, v, log_f, _ = drawn()
    pads = 6
    short = [x[:, pads:] for x in (q, k, v, log_f)]
    mask = Mask(starts=jnp.full((B,), pads))

    @jit
    def run(arrays, mask):
        return forgetting_attention(*arrays, mask=mask, block_sizes=SIZES, implementation=implementation)

    padded, plain = run([q, k, v, log_f], mask), run(short, Mask())
    assert np.all(np.asarray(padded[:, :pads]) == 0)
    assert_near(padded[:, pads:], plain, 1e-5, "o")


@pytest.mark.smoke
def test_decoding_in_chunks_equals_the_parallel_form():
    """A cache of 31 places filled to 23: the rows computed by chunks of 1 and 7 with traced offsets."""
    q, k, v, log_f, _ = drawn()
    k, v, log_f = (
        np.pad(x, [(0, 0), (0, 8)] + [(0, 0)] * (x.ndim - 2), constant_values=-0.3) for x in (k, v, log_f)
    )

    @jit
    def chunk(q, offset):
        mask = Mask(q_offset=offset, lengths=offset + q.shape[1])
        return forgetting_attention(q, k, v, log_f, mask=mask)

    pieces = [chunk(q[:, a:b], jnp.int32(a)) for a, b in ((0, 7), (7, 8), (8, 15), (15, 22), (22, 23))]
    whole = jit(forgetting_attention)(q, k[:, :T], v[:, :T], log_f[:, :T])
    assert_near(np.concatenate(pieces, 1), whole, 1e-5, "o")


def test_the_default_is_blockwise_and_lse_is_returned_on_request():
    q, k, v, log_f, _ = drawn()
    default = jit(forgetting_attention)(q, k, v, log_f)
    o, lse = jit(lambda *a: forgetting_attention(*a, return_lse=True, implementation="blockwise"))(
        q, k, v, log_f
    )
    np.testing.assert_array_equal(default, o)
    assert lse.shape == (B, T, H)


def test_block_sizes():
    assert BlockSizes.choose(1, 5000) == BlockSizes(1, 5000)
    assert BlockSizes.choose(111, 111) == BlockSizes(111, 111)
    assert BlockSizes.choose(600, 600) == BlockSizes(120, 120)
    assert BlockSizes.choose(4096, 5000) == BlockSizes(512, 256)
    with pytest.raises(ValueError, match="q=0, k=8 must be positive"):
        BlockSizes(0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 23, 2), np.float32)}, r"q is float32\[2, 23, 2\], expected Float\[B T H D\]"),
        (
            {"q": np.zeros((2, 23, 3, 5), np.float32), "log_f": None},
            "H=3 query heads must be a multiple of the K=2",
        ),
        ({"k": np.zeros((2, 23, 2, 7), np.float32)}, r"k is float32\[2, 23, 2, 7\]"),
        ({"v": np.zeros((2, 22, 2, 5), np.float32)}, r"v is float32\[2, 22, 2, 5\]"),
        ({"v": np.zeros((2, 23, 2, 0), np.float32)}, "empty operands"),
        ({"q": jnp.zeros((2, 23, 2, 5), jnp.bfloat16)}, "share one float dtype; got bfloat16, float32"),
        (
            {"log_f": np.zeros((2, 23, 1), np.float32)},
            r"log_f is float32\[2, 23, 1\], expected Float\[B S H\] with B=2, H=2, S=23",
        ),
        ({"log_f": jnp.zeros((2, 23, 2), jnp.bfloat16)}, "log_f has dtype bfloat16; cast the gate logits"),
        ({"mask": Mask(causal=False)}, "log_f needs a causal mask"),
        ({"mask": Mask(q_offset=1)}, "q_offset=1 .* passes the last of S=23 gates"),
        ({"mask": Mask(starts=jnp.zeros(3, int))}, "mask.starts has shape"),
        ({"decay_mode": "fast"}, "decay_mode='fast' is unknown"),
        (
            {"implementation": "pallas_tpu"},
            "'pallas_tpu' cannot run: it is compiled for tpu and this is cpu; .*available here: 'blockwise'",
        ),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("q", "k", "v", "log_f"), drawn(), strict=False)) | change
    with pytest.raises(ValueError, match=message):
        forgetting_attention(**arguments)
