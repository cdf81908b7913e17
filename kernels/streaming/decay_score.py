"""The score of attention with a decay: a product and a difference of two sums, each kept as a pair of floats."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Decay:
    """scale q.k + c_i - c_j, with c = hi + lo of each row and key (`kernels.forgetting.double_decay`).

    As a score of streaming attention: of_rows = (hi, lo) at the rows' positions, of_cols = (hi, lo) of the keys.
    """

    scale: float

    def __call__(self, x: jax.Array, rows, cols, of_rows, of_cols, extras=()) -> jax.Array:
        return self.scale * x + ((of_rows[0] - of_cols[0]) + (of_rows[1] - of_cols[1]))
