"""The contract of streaming attention, on a score that uses everything a score may use.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from kernels.streaming import BlockSizes, streaming_attention
from tests.kernels.contract import Case, OpContract, packed


@dataclass(frozen=True)
class Cluttered:
    """g tanh(q.k + u) - m |i - j| + u w: a nonlinearity, numbers of heads, rows and keys, perhaps no self."""

    hide_self: bool = False

    def __call__(self, x, rows, cols, of_rows, of_cols, extras):
        (u,), (w,), (gain, slope) = of_rows, of_cols, extras
        away = (rows - cols).astype(x.dtype)
        s = gain * jnp.tanh(x + u) - slope * jnp.abs(away) + u * w
        return jnp.where(away == 0, -jnp.inf, s) if self.hide_self else s


CASES = {
    "one": Case(1, 1),
    "traced_chunk_with_empty_rows": Case(
        7, 63, H=3, K=3, D=11, B=3, mask={"q_offset": np.int32(29), "starts": np.array([0, 33, 63], np.int32)},
        options={"block_sizes": BlockSizes(3, 8)},
    ),
    "segments": Case(63, 63, H=6, K=2, D=7, Dv=11, mask=packed(63, 63), options={"block_sizes": BlockSizes(16, 8)}),
    "window_without_self": Case(111, 111, H=5, K=5, D=13, mask={"window": 37}, options={"score": Cluttered(True)}),
    "all_keys": Case(7, 31, H=6, K=3, mask={"causal": False, "lengths": np.array([31, 0], np.int32)},
                     options={"block_sizes": BlockSizes(4, 8)}),
}  # fmt: skip


class StreamingContract(OpContract):
    cases = CASES
    query_operands = ("q", "u")
    key_operands = ("k", "v", "w")

    def operands(self, case, rng):
        values = {
            "u": rng.normal(size=(case.B, case.T, case.H)),
            "w": rng.normal(size=(case.B, case.S, case.H)),
            "gain": rng.normal(1, 0.3, size=case.H),
            "slope": rng.uniform(0, 0.1, size=case.H),
        }
        return super().operands(case, rng) | values

    def call(self, case, implementation, operands):
        options = {"score": Cluttered()} | case.options
        q, k, v, u, w, *extras = (operands[n] for n in ("q", "k", "v", "u", "w", "gain", "slope"))
        o, lse = streaming_attention(
            options.pop("score"), q, k, v, (u,), (w,), tuple(extras),
            mask=self.mask(case), return_lse=True, implementation=implementation, **options,
        )  # fmt: skip
        return {"o": o, "lse": lse}
