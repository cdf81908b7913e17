"""What slot attention means: limits, partition, merging, states, documents; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.forgetting import forgetting_attention
from kernels.slots import ChunkSizes, Mask, SlotState, slot_attention
from kernels.streaming import merge
from tests.kernels.slots.contract import SlotCase, draw

FLAGS = ("window", "slot_shift", "empty_slots", "document_state", "chunk_sizes", "implementation")
RETURNS = ("return_state", "return_lse", "return_branch_lse")
attend = jax.jit(slot_attention, static_argnames=(*FLAGS, *RETURNS))
softmax = jax.jit(forgetting_attention, static_argnames=("return_lse",))


def operands(seed=0, **sizes):
    """q, k, v, log_gates in float32."""
    case = SlotCase(**({"T": 23, "S": 23, "H": 4, "K": 2, "M": 3} | sizes), rotated=False)
    return [jnp.asarray(x, jnp.float32) for x in draw(case, np.random.default_rng(seed)).values()]


def close(got, want, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_a_window_over_everything_is_softmax_attention_and_the_gates_get_nothing():
    q, k, v, g = operands()
    close(attend(q, k, v, g, window=23, empty_slots="mask"), softmax(q, k, v))
    gradient = jax.grad(lambda g: jnp.sum(attend(q, k, v, g, window=23, empty_slots="mask") ** 2))(g)
    assert np.all(gradient == 0)


def test_empty_slots_are_keys_of_zero():
    """window >= T with "sink": softmax attention with M further keys and values of zero."""
    q, k, v, g = operands()
    k0, v0 = (jnp.pad(x, ((0, 0), (3, 0), (0, 0), (0, 0))) for x in (k, v))
    close(attend(q, k, v, g, window=40), softmax(q, k0, v0, mask=Mask(q_offset=3)))


def test_slots_that_keep_nothing_hold_the_last_token():
    """alpha = 0, M = 1, W = 1: row t sees exactly tokens t - 1 and t."""
    q, k, v, g = operands(M=1)
    o = attend(q, k, v, jnp.full_like(g, -1e4), window=1, empty_slots="mask")
    close(o, softmax(q, k, v, mask=Mask(window=2)))


def test_slots_that_take_nothing_stay_empty():
    q, k, v, g = operands()
    _, state = attend(q, k, v, jnp.zeros_like(g), window=4, return_state=True)
    assert np.all(state.key == 0) and np.all(state.value == 0)


@pytest.mark.parametrize(("window", "shift"), [(4, None), (4, 7), (0, None), (0, 3)])
def test_every_past_token_is_in_one_memory(window, shift):
    """Which of the two parts a value moves: the slots if j <= t - n, the window if j > t - W, and nothing else."""
    q, k, v, g = operands(B=1, H=2, K=1)
    t, n = 15, window if shift is None else shift

    def parts(v):
        options = {"slot_shift": n, "return_branch_lse": True}
        joint, (lse_slots, lse_window) = attend(q, k, v, g, window=window, **options)
        of_slots, _ = attend(q, k, v, g, window=0, **options)
        share = jax.nn.sigmoid(lse_slots - lse_window)[..., None]
        return jnp.stack([of_slots[0, t] * share[0, t], joint[0, t] - of_slots[0, t] * share[0, t]])

    moved = np.abs(jax.jit(jax.jacrev(parts))(v)).max((1, 2, 3, 5, 6)) > 1e-6  # [part, token]
    j = np.arange(23)
    np.testing.assert_array_equal(moved[0], j <= t - n)
    np.testing.assert_array_equal(moved[1], (j <= t) & (j > t - window))


def test_two_branches_merge_to_the_joint_softmax():
    q, k, v, g = operands()

    def merged(q, k, v, g):
        o_s, (lse_s, _) = attend(q, k, v, g, window=0, slot_shift=5, return_branch_lse=True)
        return merge(o_s, lse_s, *softmax(q, k, v, mask=Mask(window=5), return_lse=True))

    def joint(q, k, v, g):
        return attend(q, k, v, g, window=5, return_lse=True, implementation="reference")

    def evaluate(f):
        outputs, pull = jax.vjp(f, q, k, v, g)
        return outputs, pull(jax.tree.map(jnp.sin, outputs))

    close(jax.jit(lambda: evaluate(merged))(), jax.jit(lambda: evaluate(joint))(), 1e-5)


def test_permuting_the_slots_changes_nothing_but_their_order():
    q, k, v, g = operands()
    order = jnp.array([2, 0, 1])
    o, state = attend(q, k, v, g, window=3, return_state=True)
    again, permuted = attend(q, k, v, g[..., order], window=3, return_state=True)
    close(again, o)
    close(permuted.value, state.value[:, :, order])


def test_equal_gates_make_equal_slots_and_only_their_number_counts():
    """M equal slots weigh as one slot whose logit is larger by log M."""
    q, k, v, g = operands(M=3)
    g = jnp.repeat(g[..., :1], 3, -1)
    _, state, (lse, _) = attend(q, k, v, g, window=2, return_state=True, return_branch_lse=True)
    _, (lse_one, _) = attend(q, k, v, g[..., :1], window=2, return_branch_lse=True)
    close(lse, lse_one + np.log(3))
    np.testing.assert_array_equal(state.key, jnp.repeat(state.key[:, :, :1], 3, 2))


def test_slots_are_sub_convex_combinations_of_values():
    """A value of one in every token fills a slot to 1 - product of alpha, never above."""
    q, k, v, g = operands()
    _, state = attend(q, k, jnp.ones_like(v), g, window=2, return_state=True)
    kept = jnp.exp(g[:, :-2].sum(1))  # tokens that left the window
    close(state.value, jnp.broadcast_to((1 - kept)[..., None], state.value.shape))


def test_grouped_heads_are_repeated_heads():
    q, k, v, g = operands()
    wide = [jnp.repeat(x, 2, axis=2) for x in (k, v, g)]
    close(attend(q, k, v, g, window=3), attend(q, *wide, window=3))


@pytest.mark.parametrize("window", [0, 3, 40])
def test_a_sequence_in_pieces_with_states_and_kept_tokens_is_the_sequence(window):
    q, k, v, g = operands()
    state, outputs = None, []
    for first, end in ((0, 1), (1, 9), (9, 10), (10, 23)):
        kept = max(0, first - window)  # the window's keys come first; older ones are in the slots
        keys = [x[:, kept:end] for x in (k, v, g)]
        mask = Mask(q_offset=first - kept)
        o, state = attend(
            q[:, first:end],
            *keys,
            window=window,
            mask=mask,
            initial_state=state,
            return_state=True,
            empty_slots="mask",
        )
        outputs.append(o)
    want, last = attend(q, k, v, g, window=window, return_state=True, empty_slots="mask")
    close(jnp.concatenate(outputs, 1), want)
    close(state, last)


@pytest.mark.parametrize("state", ["zero", "initial"])
@pytest.mark.parametrize("empty", ["sink", "mask"])
def test_packed_documents_are_documents_alone(state, empty):
    q, k, v, g = operands()
    rng = np.random.default_rng(8)
    first = SlotState(*(jnp.asarray(rng.normal(size=(2, 2, 3, D)), jnp.float32) for D in (5, 3)))
    segments = jnp.array([[0] * 2 + [4] * 6 + [5] + [9] * 11 + [0] * 3] * 2)
    options = {"window": 3, "empty_slots": empty, "return_state": True}
    packed, last = attend(
        q, k, v, g, mask=Mask(q_segments=segments, kv_segments=segments), initial_state=first,
        document_state=state, chunk_sizes=ChunkSizes(8, 4), **options,
    )  # fmt: skip
    assert np.all(packed[:, :2] == 0) and np.all(packed[:, 20:] == 0)
    for start, end in ((2, 8), (8, 9), (9, 20)):
        begin = first if state == "initial" or start == 2 else None
        piece = [x[:, start:end] for x in (q, k, v, g)]
        alone, _ = attend(*piece, initial_state=begin, **options)
        close(packed[:, start:end], alone, 1e-5)
    # Padding writes nothing of its own, but the tokens that leave the window behind it still enter the slots.
    piece = [jnp.pad(x[:, 9:20], ((0, 0), (0, 3), (0, 0), (0, 0))) for x in (q, k, v, g)]
    _, want = attend(*piece, initial_state=first if state == "initial" else None, **options)
    close(last, want, 1e-5)


def test_left_padding_is_invisible_to_the_state_too():
    q, k, v, g = operands()
    starts = jnp.array([0, 9])
    o, state = attend(q, k, v, g, window=4, mask=Mask(starts=starts), return_state=True)
    alone, want = attend(*(x[1:, 9:] for x in (q, k, v, g)), window=4, return_state=True)
    close(o[1:, 9:], alone)
    close([state.key[1:], state.value[1:]], [want.key, want.value])
    assert np.all(o[1, :9] == 0)


@pytest.mark.thorough
def test_a_mesh_gives_the_same_also_with_fewer_kv_heads_than_devices():
    q, k, v, g = operands(H=4, K=2)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @jax.jit
    def run(q, k, v, g):
        def loss(*x):
            o, state = attend(*x, window=3, return_state=True)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state.key)) + jnp.sum(state.value**2), (o, state)

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, g)

    want = run(q, k, v, g)
    with jax.set_mesh(mesh):
        got = jax.jit(run.__wrapped__)(q, k, v, g)
    close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "window=-1 must be a non-negative integer"),
        ({"window": 2, "slot_shift": -3}, "slot_shift=-3 must be a non-negative integer"),
        ({"window": 2, "empty_slots": "drop"}, "empty_slots='drop' is unknown"),
        ({"window": 2, "document_state": "none"}, "document_state='none' is unknown"),
        ({"window": 2, "mask": Mask(causal=False)}, "causal only"),
        ({"window": 2, "mask": Mask(window=3)}, "mask.window=3 is not read here"),
        ({"window": 2, "mask": Mask(q_offset=1)}, "q_offset=1 with T=23 queries leaves the S=23 keys"),
        ({"window": 2, "q_window": np.zeros((2, 23, 4, 5), np.float32)}, "k_window is missing"),
        ({"window": 2, "initial_state": SlotState(np.zeros((2, 2, 3, 5)), np.zeros((2, 2, 4, 3)))},
         "expected .2, 2, 3, 5."),
        ({"window": 2, "initial_state": SlotState(np.zeros((2, 2, 3, 5)), np.zeros((2, 2, 3, 3)), np.zeros(2))},
         "initial_state.written is float"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_with_their_values(changes, message):
    with pytest.raises(ValueError, match=message):
        slot_attention(*operands(), **changes)


def test_bad_operands_and_chunks_are_refused():
    q, k, v, g = operands()
    with pytest.raises(ValueError, match="log_gates has dtype bfloat16"):
        slot_attention(q, k, v, g.astype(jnp.bfloat16), window=2)
    with pytest.raises(ValueError, match="must share one float dtype"):
        slot_attention(q, k.astype(jnp.bfloat16), v, g, window=2)
    with pytest.raises(ValueError, match="H=3 query heads must be a multiple of the K=2"):
        slot_attention(q[:, :, :3], k, v, g, window=2)
    with pytest.raises(ValueError, match="chunk=10 must be a multiple of block=4"):
        ChunkSizes(10, 4)
    with pytest.raises(ValueError, match="must be positive integers"):
        ChunkSizes(0, 4)


@pytest.mark.parametrize("size", [64, 512])
def test_the_default_goes_down_the_list_where_a_kernel_is_too_narrow(size, monkeypatch):
    """As the published layers, whose heads have 512 channels; nothing is computed."""
    monkeypatch.setattr(dispatch, "PREPARED", dispatch.ACCELERATORS)
    q, g = jnp.zeros((1, 16, 1, size)), -jnp.ones((1, 16, 1, 8))
    program = jax.make_jaxpr(lambda q: slot_attention(q, q, q, g, window=4))(q)
    assert ("linear_forward" in str(program)) == (size == 64)
