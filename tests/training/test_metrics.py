"""Metrics sinks, resuming them, the loss plot, the progress display, the clock and the peak table."""

import csv
import io
import json
import re
import sys
import types

import jax
import numpy as np
import pytest
from matplotlib import image

from attnlab.training import multihost, sinks
from attnlab.training.metrics import MetricsError, MetricsWriter
from attnlab.training.plots import plot_curves
from attnlab.training.progress import Progress
from attnlab.training.throughput import Clock, model_flops_utilisation, peak_flops


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def run(workdir, steps, *, resume_step=None, every=3):
    """A little run: training at each step, validation at some."""
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 10.0 - step, "train/tokens": 1000 * step})
            if step % every == 0:
                writer.write(step, {"validation/loss": 11.0 - step})


# --- sinks -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_one_write_reaches_jsonl_csv_and_tensorboard(tmp_path):
    run(tmp_path / "run", [1, 2, 3])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "train/loss": 9.0, "train/tokens": 1000.0},
        {"step": 2, "train/loss": 8.0, "train/tokens": 2000.0},
        {"step": 3, "train/loss": 7.0, "train/tokens": 3000.0},
        {"step": 3, "validation/loss": 8.0},
    ]
    assert table(tmp_path / "run" / "train.csv") == [
        ["step", "loss", "tokens"],
        ["1", "9.0", "1000.0"],
        ["2", "8.0", "2000.0"],
        ["3", "7.0", "3000.0"],
    ]
    assert table(tmp_path / "run" / "validation.csv") == [["step", "loss"], ["3", "8.0"]]
    assert ("train/loss", 3, 7.0) in events(tmp_path / "run" / "tensorboard")


def events(folder):
    """(name, step, value) of every scalar in TensorBoard's files, and ("purge", step, None) for a restart."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):  # a record: length (8 bytes), its checksum (4), data, checksum (4)
            length = int.from_bytes(content[position : position + 8], "little")
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += 16 + length
            if event.HasField("session_log"):
                found.append(("purge", event.step, None))
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_a_line_is_on_disk_as_soon_as_it_is_flushed(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 2.0})
    writer.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.0}\n'
    writer.close()


def test_device_scalars_are_accepted(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": jax.numpy.float32(0.5), "lr": np.float64(0.25)})
    assert sinks.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5, "lr": 0.25}]
    assert table(tmp_path / "metrics.csv") == [["step", "lr"], ["1", "0.25"]]


def test_not_a_number_is_valid_json_and_reads_back(tmp_path):
    values = {"train/a": float("nan"), "train/b": float("inf"), "train/c": float("-inf")}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values)

    def forbid(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=forbid) == {
        "step": 1,
        "train/a": "nan",
        "train/b": "inf",
        "train/c": "-inf",
    }
    (record,) = sinks.read_jsonl(tmp_path / "metrics.jsonl")
    np.testing.assert_equal(record, {"step": 1, **values})
    assert table(tmp_path / "train.csv")[1] == ["1", "nan", "inf", "-inf"]


def test_new_names_widen_the_table_and_missing_ones_are_empty(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.write(2, {"train/mfu": 0.5, "train/loss": 2.0})
        writer.write(3, {"train/mfu": 0.25})
    assert table(tmp_path / "train.csv") == [
        ["step", "loss", "mfu"],
        ["1", "1.0", ""],
        ["2", "2.0", "0.5"],
        ["3", "", "0.25"],
    ]


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "is_main", lambda: False)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_a_failed_write_surfaces_at_the_next_call(tmp_path):
    writer = MetricsWriter(tmp_path)
    (tmp_path / "train.csv").mkdir()  # the table cannot be created here
    writer.write(1, {"train/loss": 1.0})
    with pytest.raises(MetricsError, match=rf"Metrics could not be written to {tmp_path}: .*train\.csv"):
        writer.flush()
    with pytest.raises(MetricsError, match="could not be written"):
        writer.write(2, {"train/loss": 1.0})
    with pytest.raises(MetricsError, match="could not be written"):
        writer.close()
    with pytest.raises(MetricsError, match="is closed"):
        writer.write(3, {"train/loss": 1.0})


def test_the_error_of_the_training_is_not_hidden_by_one_of_the_metrics(tmp_path):
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(KeyError, match="training"),
        MetricsWriter(tmp_path) as writer,
    ):
        (tmp_path / "train.csv").mkdir()
        writer.write(1, {"train/loss": 1.0})
        raise KeyError("training")


@pytest.mark.parametrize("name", ["step", "train/step"])
def test_the_name_step_is_taken(tmp_path, name):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=f"metric name '{name}' is taken"):
        writer.write(1, {name: 1.0})


# --- Weights & Biases --------------------------------------------------------------------------------------


def test_wandb_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    with pytest.raises(ValueError, match="wandb='lab' asks for .* not installed: pip install wandb"):
        MetricsWriter(tmp_path, wandb="lab")


def test_wandb_gets_every_write_and_the_same_id_after_a_resume(tmp_path, monkeypatch):
    runs = []

    class FakeRun(types.SimpleNamespace):
        def define_metric(self, *args, **kwargs):
            self.metric = (args, kwargs)

        def log(self, values):
            self.logged.append(values)

        def finish(self):
            self.finished = True

    def init(**options):
        runs.append(FakeRun(options=options, logged=[], finished=False))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 1):
        with MetricsWriter(tmp_path, wandb="lab", resume_step=resume_step) as writer:
            writer.write(2, {"train/loss": 1.0})
    assert [run.logged for run in runs] == [[{"step": 2, "train/loss": 1.0}]] * 2
    assert runs[0].options == runs[1].options and runs[0].options["project"] == "lab"
    assert all(run.finished and run.metric == (("*",), {"step_metric": "step"}) for run in runs)


# --- resuming ----------------------------------------------------------------------------------------------


def test_resumed_record_equals_that_of_an_unbroken_run(tmp_path):
    run(tmp_path / "whole", range(1, 9))
    run(tmp_path / "broken", range(1, 7))
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # killed while writing
    with (tmp_path / "broken" / "train.csv").open("a") as file:
        file.write("7,3")
    run(tmp_path / "broken", range(5, 9), resume_step=4)
    for name in ("metrics.jsonl", "train.csv", "validation.csv"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_table_of_dropped_records_disappears(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, [2], resume_step=1)
    assert not (tmp_path / "validation.csv").exists()


def test_tensorboard_is_told_what_to_hide(tmp_path):
    run(tmp_path, range(1, 7))
    run(tmp_path, range(5, 9), resume_step=4)
    found = events(tmp_path / "tensorboard")
    assert ("purge", 5, None) in found
    assert [step for name, step, _ in found if name == "train/loss"] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]


def test_new_run_in_an_old_folder_keeps_the_old_record_aside(tmp_path):
    run(tmp_path, [1, 2, 3])
    old = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "notes.csv").write_text("mine")
    run(tmp_path, [1])
    assert [record["step"] for record in sinks.read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl.previous").read_text() == old
    assert not (tmp_path / "validation.csv").exists() and (tmp_path / "notes.csv").read_text() == "mine"


def test_garbage_inside_the_record_is_an_error_naming_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a metrics record"):
        MetricsWriter(tmp_path, resume_step=2)


# --- the plot ----------------------------------------------------------------------------------------------


def test_plot_shows_both_losses_against_steps_and_tokens(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (drawn.append((self, a, k)), plot(self, *a, **k))[1]
    )
    run(tmp_path, range(1, 7))
    path = plot_curves(tmp_path)
    assert path == tmp_path / "loss.png" and image.imread(path).shape[1] > image.imread(path).shape[0]
    lines = {(axes.get_xlabel(), k["label"]): (list(x), list(y)) for axes, (x, y), k in drawn}
    assert lines == {
        ("step", "train/loss"): ([1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]),
        ("step", "validation/loss"): ([3, 6], [8, 5]),
        ("tokens", "train/loss"): ([1000, 2000, 3000, 4000, 5000, 6000], [9, 8, 7, 6, 5, 4]),
        ("tokens", "validation/loss"): ([3000, 6000], [8, 5]),
    }


def test_plot_without_data_is_a_picture(tmp_path):
    assert image.imread(plot_curves(tmp_path)).shape[2] == 4


# --- progress ----------------------------------------------------------------------------------------------


class Ticker:
    """A clock in the test's hand."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_log_file_gets_a_line_now_and_then(tmp_path):
    now, stream = Ticker(), io.StringIO()
    progress = Progress(1000, start=10, interval=30.0, stream=stream, now=now)
    for step in range(11, 1001):
        now.time += 1.0
        progress.rates(12_345.0, 0.414)
        progress.update(step, loss=2.0)
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/1000", line)[1]) for line in lines] == [*range(11, 1000, 30), 1000]
    assert lines[1] == "step 41/1000  loss 2.0000  12.3k tokens/s  MFU 41.4 %  ETA 15:59"
    assert lines[-1].endswith("ETA 00:00")


def test_unknown_speed_and_utilisation_are_not_shown():
    stream = io.StringIO()
    progress = Progress(2, stream=stream)
    progress.update(1, loss=2.0)
    progress.rates(500.0)
    progress.update(2, loss=1.0)
    first, second = stream.getvalue().splitlines()
    assert "tokens/s" not in first and "MFU" not in first
    assert "500 tokens/s" in second and "MFU" not in second


def test_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(8, start=4, stream=stream)
    progress.update(6, loss=2.5)
    progress.note("saved")
    progress.close()
    assert "6/8" in stream.getvalue() and "75%" in stream.getvalue() and "loss 2.5000" in stream.getvalue()
    assert "saved\n" in stream.getvalue()


def test_other_processes_are_quiet(monkeypatch):
    monkeypatch.setattr(multihost, "is_main", lambda: False)
    stream = io.StringIO()
    progress = Progress(2, stream=stream)
    progress.update(1, loss=1.0)
    progress.note("saved")
    progress.close()
    assert stream.getvalue() == ""


# --- the clock ---------------------------------------------------------------------------------------------


def test_clock_leaves_pauses_out_and_measures_waiting():
    now = Ticker()
    clock = Clock(now)
    now.time += 50.0  # compiling
    clock.start()
    for _ in range(4):
        with clock.waiting():
            now.time += 0.5
        now.time += 1.5
        clock.tick(tokens=1000)
    with clock.paused(), clock.paused():
        now.time += 100.0
        with clock.waiting():  # an evaluation fetches data too
            now.time += 10.0
    rates = clock.rates()
    assert (rates.tokens_per_second, rates.step_seconds, rates.data_wait_fraction) == (500.0, 2.0, 0.25)
    assert clock.rates() is None
    now.time += 4.0
    clock.tick(tokens=1000)
    rates = clock.rates()
    assert (rates.tokens_per_second, rates.step_seconds, rates.data_wait_fraction) == (250.0, 4.0, 0.0)
    assert (clock.seconds, clock.tokens) == (12.0, 5000)


def test_clock_goes_on_after_a_restart_exactly():
    now = Ticker()
    clock = Clock(now)
    now.time += 8.0
    clock.tick(tokens=3_000_000_001)
    state = {name: np.float32(value) for name, value in clock.state().items()}  # as a checkpoint stores it
    now.time += 1000.0
    resumed = Clock.from_state(state, now)
    assert (resumed.seconds, resumed.tokens) == (8.0, 3_000_000_001)
    assert resumed.rates() is None
    now.time += 2.0
    resumed.tick(tokens=100)
    assert (resumed.seconds, resumed.tokens) == (10.0, 3_000_000_101)
    assert resumed.rates().tokens_per_second == 50.0


# --- peak FLOP/s -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(kind, tera):
    device = types.SimpleNamespace(device_kind=kind)
    assert peak_flops(device) == (None if tera is None else tera * 1e12)
    assert peak_flops(device, override=5e12) == 5e12
    with pytest.raises(ValueError, match="override=-1"):
        peak_flops(device, override=-1)


def test_no_utilisation_without_a_peak():
    assert model_flops_utilisation(1e12, peak_flops(jax.devices()[0]), 8) is None
    assert model_flops_utilisation(4e12, 1e12, 8) == 0.5
