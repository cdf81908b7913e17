"""Slot attention with time split over a mesh equals one device: outputs, states and every gradient."""

import numpy as np
import pytest

from kernels import pallas
from kernels.slots import IMPLEMENTATIONS
from tests.kernels.meshes import assert_equals_one_device
from tests.kernels.slots.contract import SlotCase, SlotContract, packed

SHARDED = SlotContract()


def rows(*lengths_of_documents):
    row = np.concatenate([np.full(length, document, np.int32) for document, length in lengths_of_documents])
    return row[None]


# Padding within a document and over a whole shard of eight, documents that begin with and within a shard.
DOCUMENTS = np.concatenate([rows((1, 5), (0, 12), (1, 3), (2, 4), (3, 8)), rows((0, 6), (1, 10), (2, 16))])
INTERRUPTED = {"q_segments": DOCUMENTS, "kv_segments": DOCUMENTS}


def assert_equal(case, shape, **options):
    assert_equals_one_device(SHARDED, case, shape, **options)


def test_the_slots_are_carried():
    """Written by tokens that enter late, restarted with documents, beside a window that looks back over shards."""
    case = SlotCase(32, 32, H=4, mask=INTERRUPTED, state=True, options={"window": 4, "empty_slots": "mask"})
    assert_equal(case, (1, 1, 4, 2))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 1, 4, 1), SlotCase(32, 32, K=1, options={"window": 5})),
        ((1, 1, 8, 1), SlotCase(32, 32, state=True, options={"window": 3, "slot_shift": 9, "empty_slots": "mask",
                                                             "document_state": "initial"})),
        ((1, 1, 4, 1), SlotCase(32, 32, mask=INTERRUPTED | {"starts": np.array([0, 9])}, state=True,
                                options={"window": 6, "slot_shift": 2, "empty_slots": "mask"})),
        ((1, 1, 4, 1), SlotCase(32, 32, mask={"starts": np.array([0, 13]), "lengths": np.array([32, 19])},
                                options={"window": 0})),
        ((1, 1, 4, 1), SlotCase(16, 16, options={"window": 64, "empty_slots": "mask"})),
        # whole: documents that restart from the initial state, and a cache before the queries
        ((1, 1, 4, 1), SlotCase(16, 16, state=True, mask=packed(16, 16),
                                options={"window": 3, "document_state": "initial"})),
        ((1, 1, 4, 1), SlotCase(8, 16, mask={"q_offset": 8}, options={"window": 3})),
    ],
)  # fmt: skip
def test_every_mask_and_option(shape, case):
    assert_equal(case, shape)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", [each.name for each in IMPLEMENTATIONS])
def test_every_implementation_runs_inside(implementation):
    with pallas.interpreted():
        case = SlotCase(32, 32, mask=INTERRUPTED, state=True, options={"window": 4, "empty_slots": "mask"})
        assert_equal(case, (1, 1, 2, 1), implementation=implementation)
