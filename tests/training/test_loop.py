"""The loop on eight fake devices: every mesh gives the losses of one device; stopping and going on lose nothing."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from attnlab.config import ConfigError
from attnlab.experiment import open_task, prepare
from attnlab.training.checkpoints import CheckpointConfig
from attnlab.training.loop import NonFiniteError, train
from attnlab.training.sharding import MeshConfig
from tests.training.runs import change, experiment, losses, run

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "fsdp_tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, sequence=4),
    "fsdp_sequence_tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}


@pytest.fixture(scope="module")
def one_device(text_folder, tmp_path_factory):
    """Losses of five steps on one device, saved every two steps."""
    workdir = tmp_path_factory.mktemp("one")
    run(experiment(text_folder, steps=5), workdir, jax.devices()[:1])
    return losses(workdir)


QUICK = ("fsdp_sequence_tensor",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in MESHES]
)
def test_every_mesh_gives_the_losses_of_one_device(name, one_device, text_folder, tmp_path):
    run(experiment(text_folder, steps=5, mesh=MESHES[name]), tmp_path)
    got = losses(tmp_path)
    assert got.keys() == one_device.keys() == {1, 2, 3, 4, 5}
    np.testing.assert_allclose(list(got.values()), list(one_device.values()), rtol=2e-5)
    assert got[5] < got[1]


def test_resumed_run_equals_the_unbroken_one_to_the_bit(one_device, text_folder, tmp_path):
    first = experiment(text_folder, steps=5)
    run(change(first, steps=3), tmp_path, jax.devices()[:1])
    summary = run(first, tmp_path, jax.devices()[:1])
    assert (summary.step, summary.reason) == (5, "complete")
    assert losses(tmp_path) == one_device
    assert run(first, tmp_path, jax.devices()[:1]).reason == "already complete"


@pytest.mark.thorough
def test_a_run_moves_to_another_mesh(one_device, text_folder, tmp_path):
    first = experiment(text_folder, steps=5)
    run(change(first, steps=2, mesh=MESHES["fsdp_tensor"]), tmp_path)
    run(change(first, mesh=MESHES["data"]), tmp_path)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(one_device.values()), rtol=2e-5)


@pytest.mark.thorough
def test_accumulated_run_equals_the_big_batch(one_device, text_folder, tmp_path):
    run(experiment(text_folder, steps=5, accumulate=4, mesh=MeshConfig(data=4)), tmp_path, jax.devices()[:4])
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(one_device.values()), rtol=2e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_a_signal_ends_the_run_politely(number, text_folder, tmp_path):
    """The signal arrives while step 2's batch is fetched; the step is finished and saved."""
    config = experiment(text_folder, steps=50, checkpoint=CheckpointConfig(every=40))
    task = open_task(config)
    prepare(task, tmp_path)
    batches = task.batches

    def interrupted(rows, cursor):
        for index, item in enumerate(batches(rows, cursor)):
            if index == 2:
                os.kill(os.getpid(), number)
            yield item

    task.batches = interrupted
    summary = train(config.training, task, tmp_path, jax.devices()[:1])
    assert summary.reason == signal.Signals(number).name and summary.step == 3
    assert (tmp_path / "checkpoints" / "00000003").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before


class TestNonFinite:
    """A batch whose weights are NaN at step 3 (and 4) makes the loss NaN."""

    def poisoned(self, text_folder, tmp_path, steps, **training):
        config = experiment(text_folder, steps=6, **training)
        task = open_task(config)
        prepare(task, tmp_path)
        batches = task.batches

        def with_nan(rows, cursor):
            for index, (batch, after) in enumerate(batches(rows, cursor)):
                if index + 1 in steps:
                    batch = batch | {"weights": batch["weights"] * np.nan}
                yield batch, after

        task.batches = with_nan
        return train(config.training, task, tmp_path, jax.devices()[:1])

    def test_stop_names_the_step_and_keeps_the_good_checkpoint(self, text_folder, tmp_path):
        with pytest.raises(
            NonFiniteError, match="step 3 has loss nan .* checkpoints up to step 2 are intact"
        ):
            self.poisoned(text_folder, tmp_path, {3, 4})
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002"]

    def test_skip_leaves_that_update_out(self, text_folder, tmp_path):
        summary = self.poisoned(text_folder, tmp_path, {3, 4}, nonfinite="skip", max_skipped=2)
        assert summary.step == 6 and np.isfinite(losses(tmp_path)[6])
        assert np.isnan(losses(tmp_path)[3])

    def test_too_many_skips_in_a_row_stop(self, text_folder, tmp_path):
        with pytest.raises(NonFiniteError, match="3 such step"):
            self.poisoned(text_folder, tmp_path, {3, 4, 5}, nonfinite="skip", max_skipped=2)


def test_another_architecture_is_refused_and_nothing_is_touched(text_folder, tmp_path):
    first = experiment(text_folder, steps=2)
    run(first, tmp_path, jax.devices()[:1])
    before = (tmp_path / "config.json").read_text()
    other = dataclasses.replace(first, model=dataclasses.replace(first.model, hidden_size=64))
    with pytest.raises(
        ConfigError, match="holds a run with model.hidden_size=32, which cannot go on with 64"
    ):
        run(other, tmp_path, jax.devices()[:1])
    assert (tmp_path / "config.json").read_text() == before
