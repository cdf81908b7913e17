"""Rows of a process, and global arrays made of them, on a mesh of eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.data import local_rows, process_rows, to_global


class HalfOfTheDevices:
    """A sharding as the second of two processes sees it: it can address the devices of one half only."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.devices}


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "sequence", "tensor"))


def test_a_process_builds_the_rows_of_its_devices(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    assert process_rows(sharding, (6, 10)) == (0, 1, 2, 3, 4, 5)
    by_data, by_tensor = list(mesh.devices[1].flat), list(mesh.devices[:, :, 1].flat)
    assert process_rows(HalfOfTheDevices(sharding, by_data), (6, 10)) == (3, 4, 5)
    assert process_rows(HalfOfTheDevices(sharding, by_tensor), (6, 10)) == (0, 1, 2, 3, 4, 5)
    replicated = NamedSharding(mesh, PartitionSpec())
    assert process_rows(HalfOfTheDevices(replicated, by_data), (6, 10)) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("spec", [("data", "sequence"), (("data", "tensor"), None), (None, "tensor"), ()])
def test_global_arrays_hold_each_row_in_its_place(mesh, spec):
    whole = {"tokens": np.arange(8 * 6, dtype=np.int32).reshape(8, 6), "weights": np.ones((8, 6), np.float32)}
    rows = [5, 0, 3, 7, 1, 2, 6, 4]  # any order
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    arrays = to_global({name: array[rows] for name, array in whole.items()}, rows, sharding, 8)
    for name, array in arrays.items():
        assert array.sharding == sharding and array.dtype == whole[name].dtype
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_rows_come_back_from_a_global_cursor(mesh):
    cursor = np.arange(16, dtype=np.int32).reshape(8, 2)
    for spec in ((("data", "tensor"),), ("data",), ()):
        array = to_global(cursor, range(8), NamedSharding(mesh, PartitionSpec(*spec)), 8)
        np.testing.assert_array_equal(local_rows(array, [6, 1]), cursor[[6, 1]])
        with pytest.raises(ValueError, match=r"not \[9\]"):
            local_rows(array, [9])
    split = to_global(cursor, range(8), NamedSharding(mesh, PartitionSpec(None, "data")), 8)
    with pytest.raises(ValueError, match="shard \\(8, 2\\) by rows alone"):
        local_rows(split, [0])


def test_a_missing_row_is_an_error(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with pytest.raises(ValueError, match=r"need rows \[3\] of"):
        to_global(np.zeros((3, 5)), [0, 1, 2], sharding, 4)
