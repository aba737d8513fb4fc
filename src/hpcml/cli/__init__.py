"""The command line: one command = parse, one call, print. ``--version`` is answered before click is imported."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:] == ["--version"]:
        from .. import __version__

        print(f"hpcml {__version__}")
        return 0
    from .root import run

    return run(sys.argv[1:])
