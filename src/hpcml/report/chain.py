"""The steps of a chain, as its report tells them: each is a run with a report of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import rundir
from ..rundir import RunDir
from .records import read

# What tells most of a step that logs, the first of them that it has.
_TELLING = ("val_accuracy", "test_accuracy", "accuracy", "val_loss", "test_loss", "loss")


@dataclass(frozen=True)
class Step:
    """A step: ``elapsed_s`` is None while it has not ended, ``text`` what it did, reached, or why it ended."""

    name: str
    state: str
    elapsed_s: float | None
    text: str


def steps(run: RunDir, plan: Mapping[str, Any]) -> tuple[Step, ...]:
    """Return a chain's own steps in their order; nothing for any other run."""
    if plan.get("work") != "chain":
        return ()
    runs = [RunDir(run.root, str(step["run"])) for step in plan.get("steps") or ()]
    return tuple(_step(one) for one in runs if one.id.startswith(f"{run.id}/"))


def _step(run: RunDir) -> Step:
    marker, found = rundir.read_json(run.status), read(run)
    begun, ended = marker.get("started"), marker.get("ended")
    elapsed_s = ended - begun if isinstance(begun, int | float) and isinstance(ended, int | float) else None
    state = str(marker.get("state") or ("RUNNING" if found.first_s else "PENDING"))
    last = {name: series.values[-1] for (rank, name), series in found.metrics.items() if rank == 0 and series.values}
    reached = next((f"{name} {last[name]:.4g}" for name in _TELLING if name in last), "")
    text = str(marker.get("outcome") or marker.get("reason") or "") or reached
    return Step(run.id.rpartition("/")[2], state, elapsed_s, text)
