"""What the kinds of Deconstructing Attention (arXiv 2510.11602) cost: counted here, and as its appendix prints it.

Letters: B batch, L length, d width (H heads of d / H), h heads. A multiply-add counts two FLOPs. The paper's
conventions: no saving from causality, no output projection, matrix products only, numbers of 2 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Cost:
    """Of one layer: flops of a pass over L tokens (prefill) or of one token after L (decode); cache in bytes."""

    flops: float
    cache_bytes: float


# kind: FLOPs of prefill, of decode, and bytes of the cache, as printed
PAPER: dict[str, tuple[Callable, Callable, Callable]] = {
    "softmax": (
        lambda B, L, d, h: 4 * B * L**2 * d + 6 * B * L * d**2,
        lambda B, L, d, h: 6 * B * d**2 + 4 * B * L * d,
        lambda B, L, d, h: 4 * B * L * d,
    ),
    "mlp": (
        lambda B, L, d, h: 6 * B * L * d**2,
        lambda B, L, d, h: 6 * B * d**2,
        lambda B, L, d, h: 0,
    ),
    "approx": (  # the diagonal form; its d^2 lacks the division by the heads
        lambda B, L, d, h: 14 * B * L * d**2,
        lambda B, L, d, h: 10 * B * d**2,
        lambda B, L, d, h: 6 * B * d + 4 * B * d**2 / h,
    ),
    "nonapprox": (
        lambda B, L, d, h: 6 * B * L * d**2,
        lambda B, L, d, h: 6 * B * d**2,
        lambda B, L, d, h: 2 * B * d + 4 * B * h,
    ),
    "rndemb_qk": (
        lambda B, L, d, h: 2 * L**2 * d + 2 * B * L**2 * d + 6 * B * L * d**2,
        lambda B, L, d, h: 2 * L * d + 2 * B * L * d + 6 * B * d**2,
        lambda B, L, d, h: 2 * (B + 1) * L * d,
    ),
}
PAPER["staticemb_qk"] = PAPER["softmax"]
PAPER["fixedseq_qk"] = PAPER["rndemb_qk"]


def paper_cost(kind: str, B: int, L: int, d: int, h: int, phase: str = "prefill") -> Cost:
    """The paper's table. ValueError for a kind or phase it does not have."""
    _check(kind, phase)
    prefill, decode, cache = PAPER[kind]
    return Cost((prefill if phase == "prefill" else decode)(B, L, d, h), cache(B, L, d, h))


def mixer_cost(
    kind: str, B: int, L: int, d: int, h: int, phase: str = "prefill", fixed_maps: bool = False
) -> Cost:
    """What a layer takes in this implementation, in the paper's conventions (2-byte numbers; nonapprox's are 4).

    fixed_maps: rndemb_qk and fixedseq_qk with their queries and keys at hand (`compile_fixed_maps`); otherwise one
    more sequence is projected to them for the whole batch. ValueError for an unknown kind or phase, or fixed_maps of
    a kind that has none.
    """
    _check(kind, phase)
    shared = kind in ("rndemb_qk", "fixedseq_qk")
    if fixed_maps and not shared:
        raise ValueError(f"{kind} has no fixed map; set fixed_maps=False")
    new, pairs = (L, L**2) if phase == "prefill" else (1, L)
    projection = 2 * new * d**2  # of one sequence
    products = {"softmax": 2, "staticemb_qk": 2, "approx": 2}.get(kind, 0) * 2 * B * pairs * d
    if shared:
        projections = B * projection + (0 if fixed_maps else 2 * projection)
        return Cost(projections + 2 * (1 + B) * pairs * d, 2 * (B + 1) * L * d)
    if kind == "nonapprox":
        return Cost(3 * B * projection + 4 * B * new * d, 4 * B * (d + 2 * h))
    return Cost(3 * B * projection + products, 0 if kind == "mlp" else 4 * B * L * d)


def _check(kind: str, phase: str) -> None:
    if kind not in PAPER:
        raise ValueError(f"kind {kind!r} has no cost here; choose one of {', '.join(sorted(PAPER))}")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is unknown; choose one of {', '.join(PHASES)}")
