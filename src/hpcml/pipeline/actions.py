"""What a step does that runs no work of its own: fetch, register, report; from run directories alone.

    python -m hpcml.pipeline.actions        # in a job: the step that $HPCML_RUN names

An action is done where a process may talk to the store of MLflow: in a job where that is a server, else on the person's
side, by the command that waits for the chain, or by ``hpcml sync``; whichever comes first.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import queue, report, rundir, site
from ..errors import HpcmlError, ServiceSilent
from ..plan import Plan
from ..rundir import RunDir
from ..site import Site
from ..steps import PROMOTED
from ..tracking import registry
from ..tracking.journal import Journal
from ..tracking.mlflow import store_uri
from . import contest
from .schema import Registration

FETCHED = "fetched.json"
DECISION = "decision.json"


def fetch(run: RunDir, plan: Plan, where: Site, wanted: Registration | None) -> list[str]:
    """Bring here what the later steps read: the promoted model to compare with; see that the data is there.

    Args:
        run: the step's; the model lies in its folder ``promoted`` then.
        wanted: what will be registered; None where nothing is.

    Returns:
        What is there, in words.

    Raises:
        HpcmlError: the data set or its version is missing; nothing may be queued then.
        ServiceSilent: MLflow gives no answer.
    """
    began, told = time.time(), dict[str, Any]()
    words = _data(plan, where, told)
    if wanted is not None:
        uri = store_uri(where, Path(plan.project))
        found = contest.champion(uri, run.root, wanted.model, wanted.alias)
        if found is None:
            words.append(f"no {wanted.model}@{wanted.alias} yet")
        else:
            _bring(run, uri, found)
            told["promoted"] = {"name": found.name, "version": found.version, "run": found.run}
            words.append(f"{found} is {wanted.alias}")
    _keep(run, FETCHED, told, "; ".join(words), began)
    return words


def _data(plan: Plan, where: Site, told: dict[str, Any]) -> list[str]:
    source = plan.data.source
    if source is None:
        return []
    if plan.data.version:
        from ..data.versions import jobs

        path, receipt = jobs.located(plan)
        told["data"] = {"source": source, "version": plan.data.version, "digest": receipt.digest, "path": str(path)}
        return [f"data {receipt.label}, {len(receipt.files):,} files"]
    path = Path(plan.project, os.path.expanduser(os.path.expandvars(source)))
    if "/" not in source:
        path = site.data_root(where, Path(plan.project)) / source
    if not path.is_dir():
        origin = plan.origins.get("data.source", "[data]")
        raise HpcmlError(f"no data set at {path}", origin=origin, fix=f"hpcml data fetch {source}, or [data] version")
    told["data"] = {"source": source, "path": str(path)}
    return [f"data {source}"]


def _bring(run: RunDir, uri: str, version: registry.Version) -> None:
    """Copy a promoted model into the run: what is evaluated later is what was promoted when the chain began."""
    with tempfile.TemporaryDirectory(prefix=".promoted.", dir=run.path) as scratch:
        folder, _ = registry.fetch(uri, run.root, str(version), Path(scratch, "download"))
        shutil.copytree(folder, Path(scratch, "whole"))
        shutil.rmtree(run.path / PROMOTED, ignore_errors=True)
        Path(scratch, "whole").rename(run.path / PROMOTED)


def register(parent: RunDir, run: RunDir, step: Mapping[str, Any]) -> None:
    """Register the chain's model if it is better than the promoted one; see ``contest``."""
    began, plan = time.time(), rundir.read_json(parent.plan)
    uri = store_uri(site.load(plan["site"]), Path(plan["project"]))
    runs = {one["name"]: RunDir(parent.root, one["run"]) for one in plan["steps"]}
    fetched = [
        rundir.read_json(runs[one["name"]].artifacts / FETCHED) for one in plan["steps"] if one["action"] == "fetch"
    ]
    against = next((told["promoted"]["version"] for told in fetched if "promoted" in told), None)
    decision = contest.decide(Registration(**step["registration"]), runs, uri, parent.root, against)
    values = {f"test_{decision.metric}": decision.value} if decision.value is not None else {}
    if decision.against_value is not None:
        values[f"promoted_{decision.metric}"] = decision.against_value
    _keep(run, DECISION, dataclasses.asdict(decision), decision.text, began, values)


def write_report(parent: RunDir, run: RunDir) -> None:
    """Make the reports of the steps that worked, and of the chain."""
    began, made = time.time(), 0
    journal = Journal(parent.event_file(0, 0, "chain"))
    journal.message("info", f"{run.id.rpartition('/')[2]}: all steps before it have completed")
    journal.close()
    for child in queue.children(parent):
        if rundir.read_json(child.plan).get("work") != "action" and rundir.read_json(child.status).get("final"):
            made += report.ensure(child) is not None
    if not report.ensure(parent, state="COMPLETED"):  # this is its last step
        raise HpcmlError("the chain's report could not be made", fix=f"hpcml report {parent.id} says why")
    words = f"report.html of the chain and {made} step{'' if made == 1 else 's'}"
    _keep(run, "reports.json", {"chain": str(parent.report), "steps": made}, words, began)


def perform(parent: RunDir, step: Mapping[str, Any]) -> bool:
    """Do a step's action, and return whether it is done, well or not; not where MLflow is silent, so that it comes later.

    What is wrong with it is its end marker: it never raises for that.

    Raises:
        ServiceSilent: MLflow gives no answer; nothing is noted.
    """
    run, began = RunDir(parent.root, step["run"]), time.time()
    try:
        register(parent, run, step) if step["action"] == "register" else write_report(parent, run)
    except ServiceSilent:
        raise
    except HpcmlError as error:
        _mark(run, "FAILED", 1, began, reason=str(error).splitlines()[0])
        _write_log(run, f"hpcml: {error}\n")
        return False
    return True


def settle(parent: RunDir, tell: Callable[[str], object] = lambda name: None) -> list[str]:
    """Do what is left of a chain on this side, once, whoever comes first; returns what was done, in words.

    Args:
        tell: called with the name of each step before it is done.

    Raises:
        ServiceSilent: MLflow or Slurm gives no answer; it comes with the next call.
    """
    plan = rundir.read_json(parent.plan)
    if plan.get("work") != "chain":
        return []
    done = []
    with alone(parent):
        for step in plan["steps"]:
            run = RunDir(parent.root, step["run"])
            if not step["here"] or step["action"] == "fetch" or not run.id.startswith(f"{parent.id}/"):
                continue
            if queue.is_due(parent, step):
                tell(step["name"])
                perform(parent, step)
                marker = rundir.read_json(run.status)
                done.append(f"{step['name']}: {marker.get('outcome') or marker.get('reason')}")
    return done


@contextlib.contextmanager
def alone(parent: RunDir) -> Iterator[None]:
    """Settle or resume a chain one after the other: the second finds what the first has done."""
    handle = os.open(parent.path / ".settle.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _keep(
    run: RunDir, file: str, told: Mapping[str, Any], words: str, began: float, values: Mapping[str, float] | None = None
) -> None:
    """Keep what an action did: in its file, its journal, its log, and last its end marker."""
    run.artifacts.mkdir(mode=0o700, exist_ok=True)
    rundir.write_json(run.artifacts / file, told)
    chain, name = RunDir(run.root, run.id.partition("/")[0]), run.id.rpartition("/")[2]
    for whose, said in ((run, words), (chain, f"{name}: {words}")):  # the chain's own report tells it too
        journal = Journal(whose.event_file(0, 0, "chain"))
        journal.message("info", said)
        if values:
            journal.metric(0, values)
        journal.close()
    if rundir.read_json(run.plan).get("work") == "action":  # in a job the worker keeps the log, and the marker
        _write_log(run, f"{words}\n" if words else "")
        _mark(run, "COMPLETED", 0, began, outcome=words)
    elif words:
        print(words, flush=True)


def _write_log(run: RunDir, text: str) -> None:
    rundir.write_bytes(run.log(0), text.encode())


def _mark(run: RunDir, state: str, code: int, began: float, *, reason: str = "", outcome: str = "") -> None:
    told = {"state": state, "exit_code": code, "final": True, "reason": reason, "outcome": outcome}
    rundir.write_json(run.status, {**told, "started": began, "ended": time.time(), "restarts": 0})


def main() -> int:
    """Do the action of the step that the environment names."""
    os.umask(0o077)
    run = RunDir(Path(os.environ["HPCML_RUNS"]), os.environ["HPCML_RUN"])
    parent = RunDir(run.root, run.id.partition("/")[0])
    step = next(one for one in rundir.read_json(parent.plan)["steps"] if one["run"] == run.id)
    try:
        register(parent, run, step) if step["action"] == "register" else write_report(parent, run)
    except HpcmlError as error:
        print(f"hpcml: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
