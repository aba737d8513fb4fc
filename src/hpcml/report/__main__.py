"""``python -m hpcml.report ROOT RUN… [--state=S] [--reason=R]``: make reports in a process of its own, niced."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import HpcmlError
from ..rundir import RunDir
from . import write


def main() -> int:
    """Make the reports; one that fails does not keep the others from being made."""
    parser = argparse.ArgumentParser(prog="hpcml.report")
    parser.add_argument("root", type=Path)
    parser.add_argument("--state", default="")
    parser.add_argument("--reason", default="")
    parser.add_argument("runs", nargs="+")
    asked = parser.parse_args()
    os.nice(10)
    worst = 0
    for number, id in enumerate(asked.runs):
        is_asked = number == len(asked.runs) - 1  # the state is of the run itself, not of its variants before it
        try:
            write(RunDir(asked.root, id), **({"state": asked.state, "reason": asked.reason} if is_asked else {}))
        except (HpcmlError, OSError) as error:
            print(f"hpcml: no report of {id}: {error}", file=sys.stderr)
            worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main())
