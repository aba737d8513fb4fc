"""A fair comparison: the same work by several strategies, one after the other, each with a run directory of its own."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from . import provision, rundir
from .errors import HpcmlError, Problem
from .interpreter import need_python, python_of
from .launch import local
from .launch import slurm as launch_slurm
from .launch.prepare import needs_framework, remedy, with_data
from .node import batch
from .plan import Plan, unfair
from .rundir import RunDir
from .site import Site


def parent_of(plans: Sequence[Plan]) -> Plan:
    """Return the plan of the whole comparison: the largest request in each respect, the sum of the time limits.

    Raises:
        HpcmlError: fewer than two plans, two of one name, or plans that differ in what must be the same.
    """
    names = [plan.name for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(plans) < 2 or twice:
        what = f"{', '.join(twice)} is given twice" if twice else "one job alone can't be compared"
        raise HpcmlError(what, origin="compare", allowed="two jobs or more, each of its own name")
    if taken := [name for name in names if name in rundir.NAMES]:
        what = f"{', '.join(taken)} is the name of a file or folder of every run"
        raise HpcmlError(what, origin="compare", allowed="two jobs or more, each of its own name")
    problems = unfair({plan.name: plan for plan in plans})
    if problems:
        raise HpcmlError(problems)
    first = plans[0]
    tasks = max(plan.tasks_per_node for plan in plans)
    cores = max(plan.tasks_per_node * plan.cpus_per_task for plan in plans)
    memory = [plan.mem_gb for plan in plans if plan.mem_gb]
    largest = max(plans, key=lambda plan: plan.gpus_per_node)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"compare-{first.experiment}")[:64]
    return dataclasses.replace(
        first,
        name=name,
        work="comparison",
        target=tuple(names),
        job_file=None,
        strategy=None,
        nodes=max(plan.nodes for plan in plans),
        gpus_per_node=largest.gpus_per_node,
        gres=largest.gres,
        tasks_per_node=tasks,
        cpus_per_task=-(-cores // tasks),
        mem_gb=max(memory, default=None),
        time_s=sum(plan.time_s for plan in plans),
    )


# A Python starts in some 20 ms; a first look at one on a cold network file system takes seconds.
_ASK_S = 60
_ASK = "import sys, importlib.util as u; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"


def need_environments(plans: Sequence[Plan], *, here: bool) -> None:
    """Refuse plans whose Pythons lack what their strategies need, before anything is made.

    Args:
        here: whether they will run on this machine, so that Pythons other than this one can be asked, too.

    Raises:
        HpcmlError: all that is missing, with what brings it.
    """
    problems: list[Problem] = []
    for plan in plans:
        try:
            needs_framework(plan)
            if here:
                need_python(plan)
                _ask_python(plan)
        except HpcmlError as error:
            problems += [_with_build(plan, problem) for problem in error.problems]
    if problems:
        raise HpcmlError(dict.fromkeys(problems))


def _ask_python(plan: Plan) -> None:
    """Ask a plan's own Python for its framework; modules and a search path of the job's own may bring what it lacks."""
    if not plan.env.python or plan.env.modules or "PYTHONPATH" in plan.env.vars:
        return
    words = [python_of(plan), "-c", _ASK, *plan.frameworks]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return  # it will say so itself, in the variant's log
    if missing := done.stdout.split():
        what = f"strategy {plan.strategy!r} needs {' and '.join(missing)}, which {words[0]} lacks"
        raise HpcmlError(what, origin=plan.origins.get("strategy", ""), fix=remedy(missing))


def _with_build(plan: Plan, problem: Problem) -> Problem:
    """In an environment of its own Horovod comes by a command of its own."""
    if plan.frameworks != ("horovod",) or not plan.env.python or os.environ.get("HPCML_PYTHON"):
        return problem
    first = "" if shutil.which(python_of(plan)) else "make that environment with torch or TensorFlow, then "
    fix = f"{first}envs/horovod/install {plan.env.python}, which builds it for what is there; or leave [env] out of the job, "
    return dataclasses.replace(problem, fix=f"{fix}and scripts/setup --horovod builds it into .venv")


def start_here(parent: Plan, plans: Sequence[Plan], site: Site) -> RunDir:
    """Make the run directories of a comparison that runs here."""
    plans = [with_data(plan) for plan in plans]
    run = rundir.create(rundir.runs_root(site, Path(parent.project)), parent.name)
    try:
        rundir.write_json(run.plan, parent.to_json())
        rundir.claim(run)
        for plan in plans:
            provision.fill(run.child(plan.name).make(), plan)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def run_here(run: RunDir, plans: Sequence[Plan], tell: Callable[[str], None]) -> None:
    """Run the variants one after the other, in the order given; one that fails does not keep the others from running.

    An interrupted variant ends the comparison.
    """
    worst, state = 0, ""
    for number, plan in enumerate(plans, 1):
        tell(f"[{number}/{len(plans)}] {plan.name}")
        marker = local.run(plan, run.child(plan.name))
        code = int(str(marker["exit_code"]))
        worst = worst or code
        if marker["state"] == "CANCELLED":
            state = "CANCELLED"
            for later in plans[number:]:
                never = {"state": state, "exit_code": 130, "final": True, "reason": "interrupted before its turn"}
                rundir.write_json(run.child(later.name).status, never)
            break
    marker = batch.close_run(run, worst) | {"final": True}
    if state:
        marker |= {"state": state, "reason": "interrupted"}
    rundir.write_json(run.status, marker)


def submit(parent: Plan, plans: Sequence[Plan], site: Site) -> tuple[RunDir, int]:
    """Queue a comparison as one Slurm job.

    Raises:
        HpcmlError: its variants need several environments, of which a job has one; or Slurm refuses.
    """
    pythons = {plan.name: python_of(plan) for plan in plans}
    modules = {plan.name: " ".join(plan.env.modules) for plan in plans}
    for key, by_name in (("Python", pythons), ("modules", modules)):
        if len(set(by_name.values())) > 1:
            who = ", ".join(f"{name} has {value or 'none'}" for name, value in by_name.items())
            fix = "one environment with all frameworks: scripts/setup --horovod; or hpcml compare inside an allocation"
            raise HpcmlError(f"{key} differs: {who}", origin="[env]", allowed="the same for all of one job", fix=fix)
    return launch_slurm.submit_comparison(parent, plans, site)


def children(run: RunDir) -> list[RunDir]:
    """Return the variants of a comparison, in its order."""
    return [run.child(name) for name in rundir.read_json(run.plan).get("target", ())]
