"""The kernels compile for a TPU by the real compiler, and the report says what it saw. Nothing here needs hardware."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels.report import environment, page, run
from kernels.report.__main__ import main
from kernels.report.case import KernelCase

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One small shape a kernel, compiled for one TPU in a process of its own, whose compiler reads its flags once."""
    out = tmp_path_factory.mktemp("report") / "tpu.json"
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "kernels.report", "--quick", "--targets=v5e", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert out.exists(), done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.thorough
def test_every_kernel_compiles_for_a_tpu(quick):
    failures = [f"{r['kernel']} {r['label']}: {r['error']}" for r in quick["records"] if "error" in r]
    assert not failures, "\n".join(failures)
    for record in quick["records"]:
        names = {kernel["name"].split(".")[0] for kernel in record["kernels"]}
        assert names, record["kernel"]
        assert all(kernel["bundles"] > 0 for kernel in record["kernels"])
    assert "libtpu" in quick["versions"] and "jax" in quick["versions"]


@pytest.mark.thorough
def test_kernels_of_vector_units_alone_spill_no_registers(quick):
    """Those that use the matrix unit do, at the block sizes that take fewest cycles: docs/kernels.md has the counts."""
    spills = {k["name"]: k["spills"] for r in quick["records"] for k in r["kernels"] if k["mxu"] == 0}
    assert len(spills) >= 9 and not any(spills.values()), spills
    assert any(k["spills"] for r in quick["records"] for k in r["kernels"])


@pytest.mark.thorough
def test_every_room_with_a_tpu_kernel_is_in_the_report(quick):
    files = [*(ROOT / "kernels").rglob("tpu.py"), *(ROOT / "kernels").rglob("gated.py")]
    rooms = {path.parent.relative_to(ROOT / "kernels") for path in files}
    names = {
        "tropical/attention": "tropical attention",
        "tropical/matmul": "max-plus product",
        "tropical/scan": "max-plus scan",
        "tropical/linear": "max-plus linear attention",
    }
    rooms = {names.get(str(room), str(room)) for room in rooms} - {"report"}
    assert rooms == {record["kernel"] for record in quick["records"]}


@pytest.mark.thorough
def test_the_page_shows_every_record_and_every_failure(quick):
    broken = {
        "kernel": "softplus",
        "label": "T=1",
        "target": "v5p",
        "backward": True,
        "error": "ValueError: no",
    }
    gpu = {"name": "k", "registers": 40, "spills": 8, "shared": 2048, "threads": 128, "tensor_cores": True}
    other = {"kernel": "softplus", "label": "T=2", "target": "sm_90", "backward": False, "temporaries": 2**20}
    other_run = {
        "command": "python -m x",
        "versions": {"jax": "1"},
        "records": [broken, other | {"kernels": [gpu]}],
    }
    text = page.render([quick, other_run])
    assert "no run time on hardware was measured" in text
    assert "| T=2 forward | sm_90 | 40 | 8 | 2 | 128 | yes | 1 |" in text
    assert "- T=1 for v5p: ValueError: no" in text
    for record in quick["records"]:
        assert f"| {record['label']} | v5e |" in text
    assert "| softplus | 1 of 1 | 0 of 1 | 1 of 1 |" in text


@pytest.mark.parametrize(
    "targets, message",
    [("v5e,sm_90", "different environments"), ("v9", "'v9'.* are unknown; known: v5e, v5p")],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_compiled(targets, message):
    with pytest.raises(ValueError, match=message):
        main([f"--targets={targets}"])


def test_dump_flags_join_those_that_are_set(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--x=1")
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    environment.prepare(["v5e", "v6e"], tmp_path)
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--x=1 --xla_jf_dump_to=")


def test_other_machines_get_the_first_shape_of_each_kernel_in_each_precision():
    def case(kernel, label, dtype, quick=False):
        return KernelCase(kernel, label, lambda name, x: x, (jax.ShapeDtypeStruct((2,), dtype),), quick=quick)

    cases = [
        case("a", "quick", jnp.bfloat16, True), case("a", "narrow", jnp.bfloat16), case("a", "second", jnp.bfloat16),
        case("a", "wide", jnp.float32), case("b", "only", jnp.float32, True),
    ]  # fmt: skip
    assert [each.label for each in run.few(cases)] == ["narrow", "wide", "only"]
