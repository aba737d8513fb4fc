"""Reports of runs: from a run directory alone to facts, pictures, advice, and one HTML file."""

import contextlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .. import rundir
from ..rundir import RunDir

# Importing matplotlib on a cold parallel file system takes a while; a comparison has several reports.
LONGEST_S = 300


def write(
    run: RunDir, *, state: str = "", reason: str = "", states: Mapping[str, tuple[str, str]] | None = None
) -> Path:
    """Make a run's report and its plots now, atomically, readable by the user alone, and return the report's path.

    Args:
        state: how the run ended where its end marker does not say; ``reason`` likewise.
        states: by name the states and reasons of a comparison's variants, likewise.

    Raises:
        HpcmlError: Jinja is missing.
        OSError: the files can't be written.
    """
    from . import facts, page, pictures

    report = facts.collect(run, state=state, reason=reason, states=states)
    drawn = pictures.draw(report)
    content = page.html(report, drawn)
    if drawn:
        run.plots.mkdir(mode=0o700, exist_ok=True)
    for picture in drawn:
        rundir.write_bytes(run.plots / f"{picture.name}.png", picture.png)
    rundir.write_bytes(run.report, content.encode())
    return run.report


def is_due(run: RunDir) -> bool:
    """Whether a run that has ended lacks a report, or has one of before its end."""
    if not run.path.is_dir():
        return False
    changed = [_changed(path) for path in (run.status, run.comparison, run.notebook(0), *run.events.glob("*.jsonl"))]
    return _changed(run.report) < max(changed)


def ensure(run: RunDir, *, state: str = "", reason: str = "", wait: bool = True) -> Path | None:
    """Make the report of a run that has ended where it is due, of a comparison those of its variants before it.

    It is made in a process of its own, niced: importing matplotlib would delay the prompt, and what goes wrong in it is
    no matter of the run. It never raises.

    Args:
        state: how the run ended where its end marker does not say; ``reason`` likewise.
        wait: whether to return when it is there; otherwise it comes by itself in a few seconds.

    Returns:
        The report's path; None where there is none (yet).
    """
    with contextlib.suppress(Exception):  # at the end of a run nothing may fail any more
        work = rundir.read_json(run.plan).get("work")
        if work == "action":  # the chain's report tells what it did
            return None
        variants = rundir.children(run) if work == "comparison" else []
        due = [one.id for one in variants if is_due(one)] + ([run.id] if is_due(run) else [])
        if due:
            words = [sys.executable, "-P", "-m", "hpcml.report", str(run.root), *due]
            words += [f"--state={state}", f"--reason={reason}"]
            process = subprocess.Popen(
                words,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if wait:
                _wait(process)
    return run.report if run.report.is_file() else None


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(LONGEST_S)
    except BaseException:  # Ctrl-C too: nobody waits for it any more
        process.kill()
        process.wait()
        raise


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
