"""What every implementation of token_log_probs must satisfy. In a case T is the length, S the vocabulary, D hidden."""

import jax.numpy as jnp
import numpy as np

from kernels.log_prob import BlockSizes, token_log_probs
from tests.kernels.contract import Case, OpContract


def head(T: int, V: int, blocks: tuple[int, int] | None = None, **options) -> Case:
    sizes = {name: options.pop(name) for name in ("B", "D") if name in options}
    if blocks:
        options["block_sizes"] = BlockSizes(*blocks)
    return Case(T, V, mask={"causal": False}, options=options, **sizes)


class LogProbContract(OpContract):
    query_operands, key_operands, output = ("hidden",), (), "logp"
    zero_without_keys = False

    def operands(self, case, rng):
        """Rows from nearly uniform to nearly certain; every fifth label absent where the case says so."""
        axis = case.options.get("vocab_axis", 1)
        scale = np.exp(rng.uniform(-3, 1.5, size=(case.B, case.T, 1)))
        labels = rng.integers(0, case.S, size=(case.B, case.T)).astype(np.int32)
        if case.options.get("absent"):
            labels[:, ::5] = -100
        return {
            "hidden": scale * rng.normal(size=(case.B, case.T, case.D)),
            "weight": rng.normal(size=(case.D, case.S) if axis else (case.S, case.D)),
            "labels": labels,
        }

    def call(self, case, implementation, operands):
        options = {name: value for name, value in case.options.items() if name != "absent"}
        options = {"return_argmax": True} | options
        out = token_log_probs(**operands, implementation=implementation, **options)
        return {name: x for name, x in out._asdict().items() if x is not None}

    def test_bfloat16(self):
        """Products of bfloat16 numbers, all else in float32: compared with the same numbers in float32."""
        case = self.chosen()
        rounded = {n: jnp.asarray(x, jnp.bfloat16) for n, x in self.draw(case).items() if n != "labels"}
        labels = {"labels": self.draw(case)["labels"]}
        got = self.evaluate(case, self.implementation, rounded | labels)
        wide = {n: x.astype(jnp.float32) for n, x in rounded.items()}
        want = self.evaluate(case, "reference", wide | labels)
        assert got[0]["logp"].dtype == jnp.float32 and got[1]["hidden"].dtype == jnp.bfloat16
        self.compare(got, want, 1e-5, self.bfloat16_tolerance, "bfloat16")
