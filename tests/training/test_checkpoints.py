"""Checkpoints: exact round trips onto other meshes, what is kept, and every kind of damage."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from attnlab.training.checkpoint_folder import ranking, steps_to_keep
from attnlab.training.checkpoints import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    StateMismatchError,
)
from attnlab.training.signature import first_difference, signature

EVERY_STEP = CheckpointConfig(every=1)
REPOSITORY = pathlib.Path(__file__).parents[2]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array
    cursor: jax.Array
    clock: dict


def make_state(step: int, sharding_of, width: int = 24) -> State:
    """A state with every dtype a run has: bf16 and f32 parameters, Adam's tuples, uint32 key data."""
    rng = np.random.default_rng(step)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(8, width)), jnp.bfloat16)},
        "norm": {"scale": jnp.asarray(rng.normal(size=(7,)), jnp.float32)},
    }
    state = State(
        step=jnp.int32(step),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
        rng=jax.random.key_data(jax.random.key(step)),
        cursor=jnp.asarray(rng.integers(0, 99, (4, 2)), jnp.int32),
        clock={"seconds": jnp.float32(1.5 * step)},
    )
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(leaf)), state)


def one_device(leaf) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def on_mesh(*shape: int):
    """[8, ...] matrices are cut along both axes of a mesh, everything else is whole on every device."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("fsdp", "tensor"))
    cut, whole = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P())
    return lambda leaf: cut if leaf.ndim == 2 and leaf.shape[0] == 8 else whole


def abstract(state, sharding_of=one_device):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), state)


def assert_identical(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save_steps(directory, steps, config=EVERY_STEP, **kwargs) -> dict[int, State]:
    states = {step: make_state(step, one_device, **kwargs) for step in steps}
    with Checkpoints(directory, config) as checkpoints:
        for step, state in states.items():
            assert checkpoints.save(step, state, force=True)
    return states


def restore_latest(directory, state, config=EVERY_STEP):
    """(step, state, warnings)"""
    with warnings.catch_warnings(record=True) as caught, Checkpoints(directory, config) as checkpoints:
        warnings.simplefilter("always")
        step, restored = checkpoints.restore_latest(abstract(state))
    return step, restored, [str(w.message) for w in caught if w.category is CheckpointWarning]


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("target", [one_device, on_mesh(4, 2), on_mesh(2, 4), on_mesh(2, 1)])
def test_round_trip_is_exact_on_any_layout(tmp_path, target):
    saved = make_state(500, on_mesh(4, 2))
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.save(500, saved)
        step, restored = checkpoints.restore_latest(abstract(saved, target))
    assert step == 500
    assert_identical(restored, saved)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert leaf.sharding.is_equivalent_to(target(wanted), leaf.ndim)


def test_restored_random_key_continues_the_stream(tmp_path):
    states = save_steps(tmp_path, [3])
    _, restored, _ = restore_latest(tmp_path, states[3])
    draws = [jax.random.normal(jax.random.wrap_key_data(s.rng), (5,)) for s in (states[3], restored)]
    np.testing.assert_array_equal(*draws)


def test_donating_the_state_after_save_does_not_change_the_checkpoint(tmp_path):
    state = {"w": jax.device_put(jnp.zeros((512, 512)), one_device(None))}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    template = abstract(state)
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        for i in range(1, 5):
            state = step(state)
            checkpoints.save(i, state)
            for _ in range(5):  # overwrite the buffers while the save is running
                state = step(state)
            _, restored = checkpoints.restore_latest(template)
            np.testing.assert_array_equal(restored["w"], 6.0 * i - 5)


def test_only_multiples_of_every_are_saved_unless_forced(tmp_path):
    state = make_state(1, one_device)
    with Checkpoints(tmp_path, CheckpointConfig(every=5)) as checkpoints:
        assert not checkpoints.save(7, state)
        assert checkpoints.save(10, state)
        assert checkpoints.save(11, state, force=True)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]


def test_synchronous_save_is_complete_when_it_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, asynchronous=False))
    checkpoints.save(1, make_state(1, one_device))
    assert (tmp_path / "00000001" / "manifest.json").exists()
    checkpoints.close()


def test_restore_of_one_step_by_number(tmp_path):
    states = save_steps(tmp_path, [2, 3, 5])
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        assert_identical(checkpoints.restore(3, abstract(states[3])), states[3])
        with pytest.raises(CheckpointError, match=r"has no checkpoint of step 4, only \[2, 3, 5\]"):
            checkpoints.restore(4, abstract(states[3]))


def test_empty_folder_gives_none_and_creates_nothing(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(1, one_device))) is None
        assert checkpoints.steps() == [] and checkpoints.best_step() is None
    assert not (tmp_path / "run").exists()


# --- what is kept ------------------------------------------------------------------------------------------


def test_newest_and_best_are_kept_together(tmp_path):
    losses = {1: 9.0, 2: 1.0, 3: None, 4: 5.0, 5: float("nan"), 6: 4.0, 7: None}
    state = make_state(1, one_device)
    with Checkpoints(tmp_path, CheckpointConfig(every=1, keep_last=2, keep_best=2)) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state, metrics=None if loss is None else {"validation/loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7]
        assert checkpoints.best_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000006", "00000007"]


def test_best_is_remembered_over_a_restart(tmp_path):
    config = CheckpointConfig(every=1, keep_last=1, keep_best=1)
    state = make_state(1, one_device)
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.6)):
        with Checkpoints(tmp_path, config) as checkpoints:
            checkpoints.save(step, state, metrics={"validation/loss": loss})
    assert Checkpoints(tmp_path).steps() == [1, 3]


def test_keep_rules_without_files():
    metrics = {1: None, 2: 3.0, 3: 3.0, 4: float("nan"), 5: 1.0}
    assert ranking(metrics) == [5, 2, 3]
    assert steps_to_keep(metrics, keep_last=1, keep_best=2) == {5, 2}
    assert steps_to_keep(metrics, keep_last=2, keep_best=0) == {4, 5}


# --- damage ------------------------------------------------------------------------------------------------


def truncate(path: pathlib.Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"has {size // 2} bytes instead of {size}"


def flip_byte(path: pathlib.Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "has checksum"


def delete(path: pathlib.Path) -> str:
    path.unlink()
    return "is missing"


@pytest.mark.parametrize("harm", [truncate, flip_byte, delete])
def test_damaged_file_is_named_and_the_step_before_is_taken(tmp_path, harm):
    states = save_steps(tmp_path, [1, 2])
    file = largest_file(tmp_path / "00000002")
    reason = harm(file)
    step, restored, messages = restore_latest(tmp_path, states[1])
    assert step == 1
    assert_identical(restored, states[1])
    assert len(messages) == 1 and "00000002" in messages[0]
    assert str(file.relative_to(tmp_path / "00000002")) in messages[0] and reason in messages[0]


def test_size_verification_finds_truncation_but_reads_nothing_back(tmp_path):
    config = CheckpointConfig(every=1, verify="size")
    states = save_steps(tmp_path, [1, 2], config)
    content = json.loads((tmp_path / "00000002" / "manifest.json").read_text())
    assert content["files"] and all(set(entry) == {"size"} for entry in content["files"].values())
    truncate(largest_file(tmp_path / "00000002"))
    step, _, messages = restore_latest(tmp_path, states[1], config)
    assert step == 1 and "bytes instead of" in messages[0]


def test_unreadable_manifest_is_damage(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    (tmp_path / "00000002" / "manifest.json").write_text('{"files": ')
    step, _, messages = restore_latest(tmp_path, states[1])
    assert step == 1 and "manifest.json is unreadable" in messages[0]


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA"])
def test_damage_without_manifest_is_found_while_reading(tmp_path, name):
    states = save_steps(tmp_path, [1, 2])
    (tmp_path / "00000002" / "manifest.json").unlink()
    (tmp_path / "00000002" / name).write_bytes(b"\0" * 50)
    step, restored, messages = restore_latest(tmp_path, states[1])
    assert step == 1 and "description is unreadable" in messages[0]
    assert_identical(restored, states[1])


def test_intact_step_without_manifest_is_accepted(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    (tmp_path / "00000002" / "manifest.json").unlink()
    with warnings.catch_warnings(), Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        warnings.simplefilter("error")
        step, restored = checkpoints.restore_latest(abstract(states[2]))
        assert step == 2
        assert_identical(restored, states[2])
        assert not checkpoints.save(2, states[2])  # known to be good, so not written again


def test_unfinished_folder_is_named_skipped_and_later_removed(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    unfinished = tmp_path / "00000003.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "00000002", unfinished)
    step, _, messages = restore_latest(tmp_path, states[2])
    assert step == 2 and unfinished.name in messages[0] and "unfinished" in messages[0]
    assert unfinished.exists()  # reading removes nothing
    save_steps(tmp_path, [3])
    assert not unfinished.exists() and Checkpoints(tmp_path).steps() == [1, 2, 3]


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    for step in states:
        delete(largest_file(tmp_path / f"{step:08d}"))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match=r"None of the checkpoints.*step 1: .*missing; step 2: .*miss"),
    ):
        checkpoints.restore_latest(abstract(states[1]))
    damaged = pytest.raises(CheckpointError, match="00000002 is damaged: file .* is missing")
    with Checkpoints(tmp_path) as checkpoints, damaged:
        checkpoints.restore(2, abstract(states[1]))


def test_damaged_steps_do_not_push_good_ones_out(tmp_path):
    config = CheckpointConfig(every=1, keep_last=2, keep_best=0)
    states = save_steps(tmp_path, [1, 2], config)
    truncate(largest_file(tmp_path / "00000002"))
    with Checkpoints(tmp_path, config) as checkpoints, pytest.warns(CheckpointWarning):
        checkpoints.restore_latest(abstract(states[1]))
        checkpoints.save(3, make_state(3, one_device))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


# --- saving again ------------------------------------------------------------------------------------------


def test_saving_a_step_twice_writes_once(tmp_path):
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        assert checkpoints.save(1, make_state(1, one_device))
        assert not checkpoints.save(1, make_state(2, one_device))
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:  # nor after a restart
        assert not checkpoints.save(1, make_state(3, one_device))
    _, restored, _ = restore_latest(tmp_path, make_state(1, one_device))
    assert_identical(restored, make_state(1, one_device))


@pytest.mark.parametrize("restore_first", [True, False])
def test_damaged_step_is_replaced_when_saved_again(tmp_path, restore_first):
    states = save_steps(tmp_path, [1, 2])
    flip_byte(largest_file(tmp_path / "00000002"))
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        if restore_first:
            with pytest.warns(CheckpointWarning):
                assert checkpoints.restore_latest(abstract(states[1]))[0] == 1
        assert checkpoints.save(2, states[2])
    step, restored, messages = restore_latest(tmp_path, states[2])
    assert step == 2 and messages == []
    assert_identical(restored, states[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_kill_while_replacing_loses_nothing(tmp_path):
    states = save_steps(tmp_path, [1])
    (tmp_path / "00000001").rename(tmp_path / "00000001.replaced")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.warns(CheckpointWarning, match="00000001.replaced is unfinished"),
        pytest.raises(CheckpointError, match="None of the checkpoints"),
    ):
        checkpoints.restore_latest(abstract(states[1]))
    save_steps(tmp_path, [2])
    assert Checkpoints(tmp_path).steps() == [1, 2]


# --- another model, wrong arguments ------------------------------------------------------------------------


def test_other_architecture_is_an_error_naming_the_parameter_and_both_shapes(tmp_path):
    save_steps(tmp_path, [1, 2])
    wider = abstract(make_state(1, one_device, width=32))
    sentence = r"params/dense/kernel is bfloat16\[8, 24\] there and bfloat16\[8, 32\] here"
    with Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be skipped
        with pytest.raises(StateMismatchError, match=sentence):
            checkpoints.restore_latest(wider)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: {**p, "extra": p["norm"]}, r"params/extra/scale is absent there and float32\[7\] here"),
        (lambda p: {"dense": p["dense"]}, r"params/norm/scale is float32\[7\] there and absent here"),
        (
            lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), p),
            r"params/dense/kernel is bfloat16\[8, 24\] there and float32\[8, 24\] here",
        ),
    ],
)
def test_missing_extra_and_retyped_parameters_are_named(change, sentence):
    saved = make_state(1, one_device)
    wanted = saved.replace(params=change(saved.params))
    assert first_difference(signature(saved), signature(saved)) is None
    assert re.fullmatch(sentence, first_difference(signature(saved), signature(wanted)))


def test_parameters_are_named_before_the_moments_that_follow_from_them():
    def tree(width):
        shape = jax.ShapeDtypeStruct((width,), jnp.float32)
        return {"moments": {"w": shape}, "state": {"params": {"w": shape}}}

    difference = first_difference(signature(tree(3)), signature(tree(5)))
    assert difference == "state/params/w is float32[3] there and float32[5] here"


def test_unsuitable_leaves_are_refused_by_name(tmp_path):
    device = one_device(None)
    with Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        with pytest.raises(ValueError, match="rng is a typed random key"):
            checkpoints.save(1, {"rng": jax.random.key(0)})
        with pytest.raises(ValueError, match="params/w is a ndarray"):
            checkpoints.save(1, {"params": {"w": np.ones(3)}})
        with pytest.raises(ValueError, match="w has no sharding"):
            checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
        with pytest.raises(ValueError, match=r"w\[8, 3\] does not fit its sharding"):
            sharding = on_mesh(4, 2)(np.zeros((8, 24)))
            checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)})
        with pytest.raises(ValueError, match="rng is a typed random key"):
            key = jax.random.key(0)
            checkpoints.restore_latest({"rng": jax.ShapeDtypeStruct((), key.dtype, sharding=device)})


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep_last": 0}, {"keep_best": -1}, {"verify": "md5"}])
def test_config_errors_name_the_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"checkpoint {name}={value!r}"):
        CheckpointConfig(**wrong).validate()


# --- killed, and no room -----------------------------------------------------------------------------------

_PREAMBLE = """
import os, resource, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from attnlab.training.checkpoints import CheckpointConfig, CheckpointError, Checkpoints
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
def state(step):
    values = np.random.default_rng(step).normal(size=(1000, 500)).astype(np.float32)
    return {"params": {"w": jax.device_put(values, device)}, "step": jax.device_put(jnp.int32(step), device)}
directory = sys.argv[1]
"""


def run_script(body: str, directory: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _PREAMBLE + textwrap.dedent(body), str(directory)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.processes
def test_killed_during_a_background_save_leaves_the_new_or_the_previous_state(tmp_path):
    body = """
        checkpoints = Checkpoints(directory, CheckpointConfig(every=1))
        checkpoints.save(1, state(1))
        checkpoints.wait()
        checkpoints.save(2, state(2))
        os._exit(9)
    """
    assert run_script(body, tmp_path).returncode == 9
    device = SingleDeviceSharding(jax.devices()[0])
    template = {
        "params": {"w": jax.ShapeDtypeStruct((1000, 500), jnp.float32, sharding=device)},
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=device),
    }
    with warnings.catch_warnings(), Checkpoints(tmp_path, EVERY_STEP) as checkpoints:
        warnings.simplefilter("ignore", CheckpointWarning)
        step, restored = checkpoints.restore_latest(template)
        assert step in (1, 2) and int(restored["step"]) == step
        expected = np.random.default_rng(step).normal(size=(1000, 500)).astype(np.float32)
        np.testing.assert_array_equal(restored["params"]["w"], expected)
        assert checkpoints.save(3, restored)  # and the run can go on
        checkpoints.wait()
        assert checkpoints.steps()[-1] == 3


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        Checkpoints(tmp_path / "file" / "run", EVERY_STEP) as checkpoints,
        pytest.raises(CheckpointError, match="step 1 could not be written to .*NotADirectory"),
    ):
        checkpoints.save(1, make_state(1, one_device))


@pytest.mark.processes
def test_full_disk_is_one_sentence_and_leaves_earlier_checkpoints_alone(tmp_path):
    """A limit on file sizes stands in for a full disk: both refuse a write half way through a file."""
    body = """
        checkpoints = Checkpoints(directory, CheckpointConfig(every=1))
        checkpoints.save(1, state(1))
        checkpoints.wait()
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        checkpoints.save(2, state(2))
        try:
            checkpoints.save(3, state(3))
            sys.exit("no error")
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        print(os.listdir(directory))
        assert checkpoints.save(2, state(2))  # there is room again
        checkpoints.close()
        print(sorted(os.listdir(directory)))
    """
    result = run_script(body, tmp_path)
    assert result.returncode == 0, result.stderr
    sentence, during, after = result.stdout.splitlines()
    assert sentence.startswith("The checkpoint of step 2 could not be written to")
    assert "File too large" in sentence and "earlier checkpoints are untouched" in sentence
    assert during == "['00000001']"
    assert after == "['00000001', '00000002']"
