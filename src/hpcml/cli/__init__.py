"""The command line: one command = parse, one call, print. ``--version`` is answered before click is imported."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:] == ["--version"]:
        from .. import __version__

        print(f"hpcml {__version__}")
        return 0
    import gc

    # Most commands are over before a collection pays: it cost a submit 8 ms of 110. Long ones still collect, less often.
    gc.set_threshold(50_000)
    from .root import run

    for stream in filter(
        None, (sys.__stdout__, sys.__stderr__)
    ):  # a terminal or file that can't hold a character shows it as \u2713
        stream.reconfigure(errors="backslashreplace")
    return run(sys.argv[1:])
