"""python -m tests.golden DIR [DIR...]: recompute the golden files in the folders (or single files) and compare.

Prints a line a file and a total. Exit status 0 if all files pass; 1 if one fails or asks for unsupported settings, or
the code for a kind of file cannot be imported; 2 if a folder holds no files.
"""

import sys

from tests.flags import set_flags

set_flags()  # before JAX is imported

from tests.golden import families  # noqa: E402
from tests.golden.check import check_files, find_files  # noqa: E402


def main(arguments: list[str]) -> int:
    if not arguments or any(each.startswith("-") for each in arguments):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        paths = find_files(arguments)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    failed, broken = 0, families.load()
    for verdict in check_files(paths):
        print(verdict.line(), flush=True)
        failed += not verdict.passed
    for sentence in broken:
        print(sentence, file=sys.stderr)
    print(f"{len(paths) - failed} of {len(paths)} files passed" + (f", {failed} FAILED" if failed else ""))
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
