"""A chain starts: a run directory for the whole, one for each step below it, and dependent Slurm jobs, or work done here."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import provision, queue, rundir
from ..errors import HpcmlError, Problem, ServiceSilent
from ..interpreter import need_python, python_of
from ..launch import local, sbatch
from ..launch import slurm as launch_slurm
from ..launch.prepare import needs_framework, with_data
from ..plan import Plan, from_json
from ..rundir import RunDir
from ..slurm import commands
from ..steps import VARIABLE
from ..tracking.journal import reader
from . import actions
from .ready import Ready
from .schema import Step

Tell = Callable[[str], None]


def check_environments(ready: Ready, *, here: bool) -> None:
    """Refuse a chain of which a step lacks its framework, or here its Python, before anything is made.

    Raises:
        HpcmlError: of all steps at once.
    """
    problems = list[Problem]()
    for step in ready.steps:
        if step.action:
            continue
        try:
            needs_framework(ready.plans[step.name])
            if here:
                need_python(ready.plans[step.name])
        except HpcmlError as error:
            problems += error.problems
    if problems:
        raise HpcmlError(dict.fromkeys(problems))


def scripts(ready: Ready) -> list[tuple[Step, str]]:
    """Return the batch script of each chosen step that is a job."""
    jobs = [step for step in ready.steps if not ready.is_here(step)]
    return [(step, sbatch.render_step(_job_of(ready, step), ready.site, step.name)) for step in jobs]


def options(needs: Sequence[str], ids: Mapping[str, int | str]) -> list[str]:
    """Return what makes a step's job wait: for the success of the jobs of the steps that it needs (sbatch(1)).

    Without the second option a job whose condition can't come true any more stays in the queue for ever.
    """
    before = [str(ids[need]) for need in needs if need in ids]
    return [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []


def make(ready: Ready, root: Path, tell: Tell, *, packed: bool) -> RunDir:
    """Make the run directories of a chain, and do what is to be done before it starts; nothing stays on a refusal.

    Args:
        packed: for a queue: the snapshots' files in archives, which the jobs unpack.

    Raises:
        HpcmlError: a data set or its version is missing, the project can't be copied.
        ServiceSilent: MLflow gives no answer.
    """
    plans = {step.name: with_data(ready.plans[step.name]) for step in ready.steps}
    ready = dataclasses.replace(ready, plans={**ready.plans, **plans}, plan=with_data(ready.plan))
    run = rundir.create(root, ready.plan.name)
    try:
        rundir.write_json(run.plan, _told(ready, run))
        for step in ready.steps:
            _make_step(ready, run, step, tell, packed=packed)
        return run
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def _make_step(ready: Ready, run: RunDir, step: Step, tell: Tell, *, packed: bool) -> None:
    child = run.child(step.name).make()
    if ready.is_here(step):
        rundir.write_json(child.plan, ready.plans[step.name].to_json())
        if step.action == "fetch":
            wanted = next((other.registration for other in ready.pipeline if other.registration), None)
            for words in actions.fetch(child, ready.plan, ready.site, wanted):
                tell(f"{step.name}: {words}")
        return
    plan, before = _job_of(ready, step), ready.pipeline.before([step.name])
    runs = {name: _run_of(ready, run, name) for name in (one.name for one in ready.pipeline) if name in before}
    handed = json.dumps({name: str(other.path) for name, other in runs.items() if other})
    env = dataclasses.replace(plan.env, vars={**plan.env.vars, VARIABLE: handed})
    provision.fill(child, dataclasses.replace(plan, env=env), packed=packed)


def _job_of(ready: Ready, step: Step) -> Plan:
    """The plan of a step's job; an action that runs as a job is a command."""
    plan = ready.plans[step.name]
    if not step.action:
        return plan
    return dataclasses.replace(plan, work="command", target=(python_of(plan), "-P", "-m", "hpcml.pipeline.actions"))


def _run_of(ready: Ready, run: RunDir, name: str) -> RunDir | None:
    return run.child(name) if name in ready.chosen else ready.earlier.get(name)


def _told(ready: Ready, run: RunDir) -> dict[str, Any]:
    """What the chain's plan.json holds: its plan, and of each step what it needs, where its run is, and who does it."""
    steps = []
    for step in ready.pipeline:
        where = _run_of(ready, run, step.name)
        if where is not None:
            chosen = dataclasses.asdict(step.registration) if step.registration else None
            told = {"name": step.name, "needs": step.needs, "action": step.action, "here": ready.is_here(step)}
            steps.append({**told, "registration": chosen, "run": where.id})
    return dataclasses.replace(ready.plan, target=ready.chosen).to_json() | {"steps": steps}


def submit(ready: Ready, root: Path, tell: Tell) -> tuple[RunDir, dict[str, int]]:
    """Queue a chain: each step a job that waits for those it needs.

    Returns:
        The chain's run directory, and Slurm's job id of each step that is a job.

    Raises:
        HpcmlError: sbatch refused a step; those before it are cancelled, and nothing stays behind.
    """
    launch_slurm.find_sbatch()
    texts = {step.name: script for step, script in scripts(ready)}
    run = make(ready, root, tell, packed=True)
    rundir.write_json(run.submitted, {"submitted": time.time(), "cluster": commands.cluster_name()})
    ids: dict[str, int] = {}
    try:
        for step in ready.steps:
            if step.name in texts:
                child = run.child(step.name)
                plan = from_json(rundir.read_json(child.plan))
                ids[step.name] = launch_slurm.queue(child, plan, texts[step.name], options(step.needs, ids))
    except BaseException:
        for job_id in reversed(ids.values()):
            _cancel(job_id)
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run, ids


def _cancel(job_id: int) -> None:
    try:
        commands.cancel(job_id)
    except HpcmlError:
        return  # what refused the next step is told


def run_here(run: RunDir, tell: Tell) -> None:
    """Run the steps that have not completed, one after the other; one that fails ends those that need it."""
    rundir.claim(run)
    steps = [step for step in rundir.read_json(run.plan)["steps"] if step["run"].startswith(f"{run.id}/")]
    for number, step in enumerate(steps, 1):
        child = RunDir(run.root, step["run"])
        if rundir.read_json(child.status).get("final"):
            continue
        state = queue.state_of(child)
        if state.is_final:
            queue.note_never(child, state.reason)
            continue
        tell(f"[{number}/{len(steps)}] {step['name']}")
        if step["here"]:
            _act(run, step, tell)
            continue
        _count_restart(child)
        marker = local.run(from_json(rundir.read_json(child.plan)), child)
        if marker["state"] == "CANCELLED":
            for later in steps[number:]:
                queue.note_never(RunDir(run.root, later["run"]), "interrupted before its turn")
            break
    queue.state_of(run)  # notes the chain's end where it has come


def _act(run: RunDir, step: Mapping[str, Any], tell: Tell) -> None:
    try:
        actions.perform(run, step)
    except ServiceSilent as error:
        tell(f"hpcml: {error}\n  the rest of the chain comes with: hpcml sync {run.id}")
        return
    marker = rundir.read_json(RunDir(run.root, step["run"]).status)
    tell(f"{step['name']}: {marker.get('outcome') or marker.get('reason')}")


def resume(run: RunDir) -> dict[str, int]:
    """Let an ended chain go on from the steps that did not complete, each in its own directory, with the code it had.

    Returns:
        Slurm's job ids by step; empty where the chain is one of this machine: it then is to be run by ``run_here``.

    Raises:
        HpcmlError: it has not ended, has completed, or sbatch refused.
        ServiceSilent: Slurm gives no answer.
    """
    with actions.alone(run):
        _check_resumable(run)
        return _resume(run)


def _check_resumable(run: RunDir) -> None:
    state = queue.state_of(run)
    if state.name == "COMPLETED":
        raise HpcmlError(
            f"run {run.id} has completed: there is nothing to go on with", fix="hpcml submit starts it anew"
        )
    if not state.is_final and state.name != "COMPLETING":
        fix = f"hpcml logs -f {run.id} follows it, hpcml cancel {run.id} ends it"
        raise HpcmlError(f"run {run.id} has not ended: it is {state.name}", fix=fix)


def _resume(run: RunDir) -> dict[str, int]:
    known = rundir.read_json(run.plan)
    left = [step for step in known["steps"] if not _is_complete(run, step)]
    queued = rundir.read_json(run.submitted).get("submitted") is not None
    ids: dict[str, int] = {}
    for step in left:
        child = RunDir(run.root, step["run"])
        _count_restart(child)
        marker = rundir.read_json(child.status)
        for path in (child.status, child.owner, child.report):
            path.unlink(missing_ok=True)
        if not queued or step["here"]:
            continue
        plan = from_json(rundir.read_json(child.plan))
        try:
            ids[step["name"]] = launch_slurm.queue(
                child, plan, child.script.read_text(encoding="utf-8"), options(step["needs"], ids)
            )
        except BaseException:
            rundir.write_json(child.status, marker)
            for job_id in reversed(ids.values()):
                _cancel(job_id)
            raise
    run.status.unlink(missing_ok=True)
    if queued:
        rundir.write_json(run.submitted, {"submitted": time.time(), "cluster": commands.cluster_name()})
    else:
        rundir.claim(run)
    return ids


def _count_restart(run: RunDir) -> None:
    """Tell what is started next how often this step was begun before."""
    restarts = (place["restart"] for _, place in reader.event_files(run.events))
    os.environ["HPCML_RESUMED"] = str(max(restarts, default=-1) + 1)


def _is_complete(run: RunDir, step: Mapping[str, Any]) -> bool:
    is_own = str(step["run"]).startswith(f"{run.id}/")
    return not is_own or rundir.read_json(RunDir(run.root, step["run"]).status).get("state") == "COMPLETED"
