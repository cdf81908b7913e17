"""Every golden file through the checker, and the checker itself: what it must not let pass."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.golden import __main__ as command
from tests.golden import families
from tests.golden.check import check_file, find_files, relative_error
from tests.golden.registry import Golden

FOLDER = Path(__file__).parent
FILES = find_files([FOLDER])
EXPECTED = {
    "cosformer": 12, "deconstructed": 10, "egsw": 10, "forgetting": 11, "idw": 15, "nha": 12, "softplus": 9,
    "tropical": 38,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def all_families():
    assert families.load() == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_file(path):
    verdict = check_file(path)
    assert verdict.passed, verdict.line()
    assert verdict.compared >= len(Golden.load(path).results)


def test_every_file_of_every_paper_is_there_and_used(capsys):
    """`test_file` runs on every file found; here they are counted, so that none can be lost unnoticed."""
    counts = Counter(path.parent.name for path in FILES)
    with capsys.disabled():
        print(f"\n{sum(counts.values())} golden files: {dict(counts)}")
    assert counts == EXPECTED


@pytest.fixture
def golden():
    return Golden.load(FOLDER / "forgetting" / "op_causal.npz")


def rewrite(golden, folder, meta=None, **changes):
    """A copy of a file with some arrays changed (None removes one)."""
    arrays = {name: x for name, x in (golden.arrays | changes).items() if x is not None}
    path = folder / "changed.npz"
    np.savez(path, meta=json.dumps(golden.meta | (meta or {})), **arrays)
    return path


def test_names_of_files_do_not_matter(golden, tmp_path):
    assert check_file(rewrite(golden, tmp_path)).passed


@pytest.mark.parametrize("key", ["out.o", "grad.k"])
def test_a_wrong_digit_fails(golden, tmp_path, key):
    x = golden.arrays[key].copy()
    x.flat[7] += 1e-8 * np.abs(x).max()
    verdict = check_file(rewrite(golden, tmp_path, **{key: x}))
    assert not verdict.passed and key in verdict.line()
    worst = verdict.worst_gradient if key.startswith("grad") else verdict.worst_output
    assert 0.9e-8 < worst < 1.1e-8


def test_an_array_nobody_computes_fails(golden, tmp_path):
    verdict = check_file(rewrite(golden, tmp_path, **{"out.temperature": np.ones(3)}))
    assert "does not compute out.temperature" in verdict.line()


def test_other_settings_are_really_used(golden, tmp_path):
    assert not check_file(rewrite(golden, tmp_path, meta={"sm_scale": 0.5})).passed
    assert not check_file(rewrite(golden, tmp_path, meta={"window": 5})).passed


@pytest.mark.parametrize(
    ("meta", "message"),
    [({"causal": False}, "unsupported: .* causal"), ({"threshold_mode": "guess"}, "unsupported: .*'guess'")],
)
def test_unsupported_settings_are_said(golden, tmp_path, meta, message, capsys):
    path = rewrite(golden, tmp_path, meta=meta)
    assert command.main([str(path)]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_a_file_of_no_family_and_a_broken_file_fail(golden, tmp_path, capsys):
    unknown = rewrite(golden, tmp_path, **{"in.log_fgate": None, "in.q": None})
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    assert command.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"FAIL {unknown}" in out and "no family recognises" in out
    assert "broken.npz" in out and "0 of 2 files passed, 2 FAILED" in out


def test_command_passes_and_says_what_it_did(tmp_path, golden, capsys):
    rewrite(golden, tmp_path)
    assert command.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok ") and "forgetting operator (reference, blockwise; 12 arrays)" in out
    assert out.endswith("1 of 1 files passed\n")


def test_folders_without_files_are_refused(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "holds no .npz file" in capsys.readouterr().err
    assert command.main([]) == 2


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([0.0, 1e-3], [0.0, 0.0], 1e-3),
        ([-np.inf, 1.0], [-np.inf, 1.0], 0.0),
        ([0.0, 1.0], [-np.inf, 1.0], np.inf),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_relative_error(got, want, error):
    assert relative_error(np.array(got), np.array(want)) == pytest.approx(error)


def test_integers_must_be_equal():
    assert relative_error(np.array([1, 2]), np.array([1, 2])) == 0
    assert relative_error(np.array([1, 3]), np.array([1, 2])) == np.inf
