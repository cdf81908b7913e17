"""Costs: the paper's printed figures where they must agree with the counted ones, and where they must not."""

import pytest

from attnlab.attention.deconstructed import NonApproxAttention
from attnlab.attention.deconstructed_costs import PAPER, mixer_cost, paper_cost

SIZES = {"B": 3, "L": 11, "d": 14, "h": 2}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["softmax", "staticemb_qk", "mlp"])
def test_counted_costs_are_the_papers(kind, phase):
    assert mixer_cost(kind, **SIZES, phase=phase) == paper_cost(kind, **SIZES, phase=phase)


def test_the_papers_softmax_by_hand():
    cost = paper_cost("softmax", **SIZES)
    assert (cost.flops, cost.cache_bytes) == (4 * 3 * 121 * 14 + 6 * 3 * 11 * 196, 4 * 3 * 11 * 14)
    assert paper_cost("softmax", **SIZES, phase="decode").flops == 6 * 3 * 196 + 4 * 3 * 11 * 14
    assert paper_cost("approx", **SIZES).cache_bytes == 6 * 3 * 14 + 4 * 3 * 196 / 2
    assert paper_cost("nonapprox", **SIZES).cache_bytes == 2 * 3 * 14 + 4 * 3 * 2


def test_shared_maps_project_and_score_one_sequence():
    """The paper counts queries and keys for every row; here one sequence's are enough."""
    counted, printed = mixer_cost("rndemb_qk", **SIZES), paper_cost("rndemb_qk", **SIZES)
    assert printed.flops - counted.flops == (3 - 1) * 4 * 11 * 196
    assert counted.cache_bytes == printed.cache_bytes == 2 * 4 * 11 * 14
    compiled = mixer_cost("fixedseq_qk", **SIZES, fixed_maps=True)
    assert counted.flops - compiled.flops == 4 * 11 * 196


def test_the_state_of_nonapprox_does_not_grow():
    long = mixer_cost("nonapprox", **(SIZES | {"L": 1000}))
    config = NonApproxAttention.Config(num_heads=2, head_dim=7)
    assert long.cache_bytes == 4 * 3 * NonApproxAttention.state_size(config, 1000)
    assert mixer_cost("nonapprox", **SIZES, phase="decode").flops == 6 * 3 * 196 + 4 * 3 * 14


def test_unknown_questions_are_refused():
    for call in (mixer_cost, paper_cost):
        with pytest.raises(ValueError, match="kind 'fnet' has no cost here"):
            call("fnet", **SIZES)
        with pytest.raises(ValueError, match="phase='train' is unknown"):
            call("mlp", **SIZES, phase="train")
    with pytest.raises(ValueError, match="mlp has no fixed map"):
        mixer_cost("mlp", **SIZES, fixed_maps=True)
    assert set(PAPER) >= {"softmax", "mlp", "approx", "nonapprox", "rndemb_qk", "fixedseq_qk", "staticemb_qk"}
