"""The files of a run that MLflow gets."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..rundir import RunDir
from .ledger import Ledger
from .store import Store

# What a delivery writes about itself is no part of the run.
LOG = "delivery.txt"


def send(to: Store, run: RunDir, ledger: Ledger) -> int:
    """Send the files that are new, or changed since they were sent."""
    sent = 0
    for path, now in of(run):
        key = str(path.relative_to(run.path))
        if ledger.artifacts.get(key) != now:
            folder = os.path.dirname(key)
            to.client.log_artifact(ledger.place["run_id"], str(path), folder or None)
            ledger.artifacts[key] = now
            sent += 1
            ledger.save(run)
    return sent


def of(run: RunDir) -> Iterator[tuple[Path, list[int]]]:
    """Yield each file that MLflow gets, with its time and size before the upload: what is appended then goes next.

    The marker and the report come last: whoever sees them there sees all that they are about.
    """
    notebooks = (run.notebook(0), *sorted(run.path.glob("notebook.*.ipynb")))
    logs = (path for path in sorted(run.logs.glob("*")) if path.name != LOG)
    origin = (run.plan, run.script, run.provenance, run.patch, run.packages)
    folders = (run.profile, run.model, run.artifacts, run.plots)
    made = (run.comparison, run.plot, *(path for folder in folders for path in sorted(folder.rglob("*"))))
    last = (run.status, run.report)
    for path in dict.fromkeys((*origin, *notebooks, *logs, *made, *last)):
        if path.is_file():
            stat = path.stat()
            yield path, [stat.st_mtime_ns, stat.st_size]
