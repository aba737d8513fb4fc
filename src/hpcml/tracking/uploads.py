"""The files of a run that MLflow gets."""

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
            to.client.log_artifact(ledger.place["run_id"], str(path), _folder_of(path, run) or None)
            ledger.artifacts[key] = now
            sent += 1
            ledger.save(run)
    return sent


def _folder_of(path: Path, run: RunDir) -> str:
    """Return MLflow's folder of a file: as in the run directory, and what the work logged where the work said.

    Only what has the name of a file or folder of the run's own stays below ``artifacts``: it would take its place.
    """
    if run.artifacts in path.parents:
        inside = path.relative_to(run.artifacts)
        records = (run.plan, run.script, run.provenance, run.patch, run.packages, run.status, run.comparison)
        made = (run.notebook(0), run.logs, run.profile, run.model, run.artifacts, run.plots, run.plot, run.report)
        if inside.parts[0] not in {path.name for path in (*records, *made)}:
            return _folder(inside)
    return _folder(path.relative_to(run.path))


def _folder(path: Path) -> str:
    return "" if path.parent == Path() else path.parent.as_posix()


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
