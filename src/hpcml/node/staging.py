"""A job's data set on its node, before the work starts: its version verified, all nodes agreed, a copy made where that pays.

Every rank comes here; the first of each node verifies, and hpcml.data.staging has one of them copy.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..plan import Plan
from ..rundir import RunDir
from ..tracking.journal import Journal
from .bootstrap import OURS, Bootstrap
from .topology import Topology

# JSON, {name: folder on this node}: what hpcml.data.images.find looks at first.
DATASETS = "HPCML_DATASETS"
# Nodes of one job start within seconds of each other; one whose disk hangs is told by the others after this.
AGREE_S = 300
_LOOK_S = 0.1

Say = Callable[[str], None]


@contextlib.contextmanager
def data(run: RunDir, plan: Plan, ready: Bootstrap, restart: int, say: Say) -> Iterator[dict[str, str]]:
    """Yield the variables for the work, with where its data set is; afterwards this job's copies are removed here.

    Args:
        say: told what was verified, and whether it is read from a copy.

    Raises:
        HpcmlError: the version isn't there, isn't whole, or isn't the one that another node has.
    """
    variables = dict(ready.variables)
    if not plan.data.source:
        yield variables
        return
    from ..data import staging

    try:
        with _ending_with_grace():
            folder = _lead(run, plan, ready.topology, restart, say) if ready.topology.local_rank == 0 else None
            folder = folder or _follow(run, plan, ready.topology, restart, say)
        source = plan.data.source
        names = dict.fromkeys((source, os.path.normpath(source), PurePosixPath(os.path.normpath(source)).name))
        variables[DATASETS] = json.dumps(dict.fromkeys(names, str(folder)))
        variables[OURS] = f"{variables.get(OURS, '')} {DATASETS}".strip()
        yield variables
    finally:
        staging.clean()


@contextlib.contextmanager
def _ending_with_grace() -> Iterator[None]:
    """Have TERM end this process by way of what is to be cleaned up; there is no work yet to pass it on to."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lead(run: RunDir, plan: Plan, place: Topology, restart: int, say: Say) -> Path:
    """Verify, agree with the other nodes, stage, and tell the other ranks of this node."""
    name = place.hosts[place.node] if place.hosts else os.uname().nodename
    told: dict[str, Any] = {"restart": restart, "node": name}
    try:
        folder, receipt = _source(plan)
        told["digest"] = receipt.digest if receipt else ""
        if receipt:
            say(f"data {receipt.label}: {len(receipt.files):,} files at {folder}, as they should be")
            if place.nodes > 1:
                rundir.write_json(_file(run, place.node), told)
                _agree(run, place, restart)
        placed = _placed(plan, folder, say)
        if receipt and placed != folder:
            from ..data.versions import receipt as receipts

            receipts.need(placed, receipt, "start it again: the copy is made anew", contents=True)
        with contextlib.closing(Journal(run.event_file(place.rank, restart, "data"))) as journal:
            staged = "yes" if placed != folder else "no"
            journal.write("params", values={"data.folder": str(folder), "data.staged": staged})
        told["folder"] = str(placed)
        return placed
    except BaseException as error:
        told["error"] = (
            str(error).splitlines()[0] if isinstance(error, HpcmlError) else f"{type(error).__name__}: {error}"
        )
        raise
    finally:
        rundir.write_json(_file(run, place.node), told)


def _follow(run: RunDir, plan: Plan, place: Topology, restart: int, say: Say) -> Path:
    """Wait for the first rank of this node, then hold its copy; that one's end ends this one as well."""
    while True:
        told = _told(run, place.node, restart)
        if told.get("error"):
            raise HpcmlError(f"the data set was refused: {told['error']}", origin=f"the first rank on {told['node']}")
        if told.get("folder"):
            break
        time.sleep(_LOOK_S)
    folder, _ = _source(plan, verify=False)
    return _placed(plan, folder, say)


def _agree(run: RunDir, place: Topology, restart: int) -> None:
    """Wait until every node has told its version, and refuse to go on where one has another, or none."""
    deadline = time.monotonic() + AGREE_S
    while True:
        nodes = [_told(run, node, restart) for node in range(place.nodes)]
        failed = next((told for told in nodes if told.get("error")), None)
        if failed:
            raise HpcmlError(f"the data set was refused: {failed['error']}", origin=f"node {failed['node']}")
        if all(nodes):
            break
        if time.monotonic() > deadline:
            silent = ", ".join(str(number) for number, told in enumerate(nodes) if not told)
            what = f"node {silent} of {place.nodes} has not told its version of the data in {AGREE_S} s"
            raise HpcmlError(what, origin="[data] version", fix=f"see {run.logs}, and whether its file systems answer")
        time.sleep(_LOOK_S)
    if len({told["digest"] for told in nodes}) > 1:
        each = ", ".join(f"{told['node']} has {told['digest'][:12]}" for told in nodes)
        fix = "one HPCML_DATA for all nodes, on a file system that all see; then pull the version again"
        raise HpcmlError(f"the nodes have different versions of the data: {each}", origin="[data] version", fix=fix)


def _source(plan: Plan, *, verify: bool = True) -> tuple[Path, Any]:
    """Return where a job's data set lies for all nodes, and its receipt where it is a version."""
    from ..data.versions import jobs

    return jobs.located(plan, verify=verify) if plan.data.version else (jobs.unversioned(plan), None)


def _placed(plan: Plan, folder: Path, say: Say) -> Path:
    from ..data import staging

    epochs = plan.effective_params.get("epochs")
    return staging.place(folder, plan.data.stage, say=say, epochs=epochs if isinstance(epochs, int) else None)


def _told(run: RunDir, node: int, restart: int) -> Mapping[str, Any]:
    told = rundir.read_json(_file(run, node))
    return told if told.get("restart") == restart else {}


def _file(run: RunDir, node: int) -> Path:
    """What the first rank of a node has found, for the others."""
    return run.path / f"data.{node}.json"
