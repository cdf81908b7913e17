"""Compiles the Pallas kernels for machines that need not be here, and tabulates what the compilers say.

    python -m kernels.report [--quick] [--targets=v5e,v5p,v6e,tpu7x] [--kernels=forgetting,...] [--out=FILE.json]
    python -m kernels.report --page FILE.json ... > docs/kernels.md

TPU targets need the package libtpu (tests/requirements.txt has it); GPU targets (sm_80, sm_90) need an environment with
JAX's CUDA plugin and with ptxas on the PATH. `make report` builds both and does everything.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from kernels.report import environment


def main(arguments: list[str] | None = None) -> int:
    """Returns how many cases did not compile (at most 100), as the exit status."""
    options = _parser().parse_args(arguments)
    if options.page:
        from kernels.report import page

        print(page.render([json.loads(file.read_text()) for file in options.page]), end="")
        return 0
    names = options.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="kernel-report-") as folder:
        found = _measure(names, Path(folder) / "dump", options)
    failed = [record for record in found["records"] if "error" in record]
    print(f"{len(found['records']) - len(failed)} of {len(found['records'])} compiled for {options.targets}")
    return min(len(failed), 100)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape a kernel")
    parser.add_argument(
        "--targets", default=",".join(environment.TPU_TARGETS), help="machines, comma-separated"
    )
    parser.add_argument("--kernels", help="kernels, comma-separated; all by default")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    parser.add_argument(
        "--page", type=Path, nargs="+", help="print the page made of these files of figures instead"
    )
    parser.add_argument("--resume", action="store_true", help="keep what --out has from the same compilers")
    return parser


def _measure(names, folder, options):
    environment.prepare(names, folder)
    from kernels.report import cases, run  # after the flags, which the compilers read once

    wanted = options.kernels.split(",") if options.kernels else None
    chosen = [c for c in cases.all_cases() if not wanted or c.kernel in wanted]
    chosen = [c for c in chosen if c.quick] if options.quick else chosen
    found = {
        "command": "python -m kernels.report " + " ".join(sys.argv[1:]),
        "versions": run.versions(),
        "records": [],
    }
    known = _known(options, found["versions"])
    for record in run.measure(chosen, names, folder, known):
        print(run.sentence(record), flush=True)
        found["records"].append(record)
        if options.out:  # after each, since compiling them all takes long
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _known(options, versions):
    """Records of a run before that was cut off; of other compilers, or unasked for, none."""
    if not (options.resume and options.out and options.out.exists()):
        return []
    before = json.loads(options.out.read_text())
    return before["records"] if before["versions"] == versions else []


if __name__ == "__main__":
    sys.exit(main())
