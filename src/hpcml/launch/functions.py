"""Python functions as jobs: ``hpcml.submit`` and ``hpcml.map``.

submitit queues the calls and keeps their pickled results; what runs on the node is the worker of every other run, in
a run directory of its own, and the state comes from the end marker or Slurm. A function of a script or notebook
travels with its code. A function of a module is imported on the node when it starts: there is no snapshot, so leave
that module as it is until then.
"""

import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import facts, plan, provision, rundir
from .. import job as jobs
from .. import site as sites
from ..errors import HpcmlError, ServiceSilent
from ..job import Job
from ..node import bootstrap
from ..plan import Plan
from ..rundir import RunDir
from ..site import Site
from ..slurm import commands
from . import sbatch, slurm
from .calls import Call, name_of, pack
from .future import Future, RemoteError
from .prepare import with_data

__all__ = ["Future", "RemoteError", "map_functions", "submit"]

R = TypeVar("R")

# sbatch gives up on a silent controller after about 9 s; a local array starts three processes for each call.
QUEUE_S = 300


def submit(
    fn: Callable[..., R], /, *args: Any, job: str | Path | Job | None = None, site: str | None = None, **kwargs: Any
) -> Future[R]:
    """Run ``fn(*args, **kwargs)`` as a job, in the folder that this is called in, and return its future.

    Import frameworks inside the function, after ``hpcml.begin()`` where it calls that.

    Args:
        job: resources, queue, environment and params: the path of a job file, whose notebook, script or command then
            doesn't count and may be left out; a ``Job``; None for one core and 30 minutes. Its strategy prepares the
            node; where the function checks nothing of it, its log warns and the result stands.
        site: a site's name; None chooses as everywhere.

    Raises:
        HpcmlError: the job asks for more than the site has, an argument can't be pickled, or Slurm refused; nothing
            is left behind.
    """
    prepared, where = _prepared(fn, job, site)
    call = pack(fn, args, kwargs, Path(prepared.project))
    run, (job_id,) = _queued(prepared, where, [call], array=False)
    return Future(run, job_id, prepared.tasks, name_of(fn))


def map_functions(
    fn: Callable[..., R],
    /,
    *iterables: Iterable[Any],
    job: str | Path | Job | None = None,
    site: str | None = None,
) -> list[Future[R]]:
    """Run ``fn`` once for each set of arguments, as ``map`` does, and return the futures in their order.

    In Slurm all are one array; here as many run at once as there are cores for. Each has its run directory below that
    of the whole. Arguments and errors as for ``submit``; with nothing to do nothing is submitted.
    """
    prepared, where = _prepared(fn, job, site)
    calls = [pack(fn, args, {}, Path(prepared.project)) for args in zip(*iterables, strict=False)]
    if not calls:
        return []
    if len(calls) == 1:  # no array of one: submitit keeps a lone call as a job of its own
        run, (job_id,) = _queued(prepared, where, calls, array=False)
        return [Future(run, job_id, prepared.tasks, name_of(fn))]
    parent, ids = _queued(prepared, where, calls, array=True)
    runs = (parent.child(str(index)) for index in range(len(calls)))
    return [Future(run, job_id, prepared.tasks, name_of(fn)) for run, job_id in zip(runs, ids, strict=True)]


def _prepared(fn: Callable[..., Any], job: str | Path | Job | None, site_name: str | None) -> tuple[Plan, Site]:
    if not callable(fn):
        raise HpcmlError(f"{fn!r} is not a function", fix="hpcml.submit(function, argument, …)")
    where, _ = sites.choose(site_name, None if site_name else commands.cluster_name())
    missing = [name for name in ("sbatch", "srun") if where.scheduler == "slurm" and not shutil.which(name)]
    if missing:
        raise HpcmlError(
            f"{' and '.join(missing)} not on PATH: no Slurm here",
            origin=f"site {where.name}",
            fix='log in to the cluster, practise with scripts/devcluster, or run it here: site="local"',
        )
    wanted = _job_of(name_of(fn), job)
    decided = plan.resolve(wanted, where, facts.gather(wanted, where))
    for note in decided.notes:
        print(f"hpcml: {note}", file=sys.stderr)
    return decided, where


def _job_of(function: str, job: str | Path | Job | None) -> Job:
    if job is None:
        wanted = Job(function, "function", (function,), jobs.project_of(Path.cwd() / "session.py"))
    elif isinstance(job, Job):
        wanted = dataclasses.replace(job, work="function", target=(function,))
    else:
        wanted = jobs.load(job, function=function)
    # A qualified name may hold <locals> and <lambda>; what remains follows job.NAME_PATTERN.
    words = [word for word in re.findall(r"[A-Za-z0-9_]+", function) if word not in ("locals", "lambda")]
    name = (words or ["function"])[-1].lstrip("_")[:64] or "function"
    return dataclasses.replace(wanted, name=name, experiment=wanted.experiment or name)


def _queued(decided: Plan, where: Site, calls: Sequence[Call], *, array: bool) -> tuple[RunDir, list[str]]:
    """Make the run directories, queue the calls, and note what became of them; on a refusal nothing stays."""
    decided = with_data(decided)
    run = rundir.create(rundir.runs_root(where, Path(decided.project)), decided.name)
    members = [run.child(str(index)).make() for index in range(len(calls))] if array else [run]
    try:
        run.functions.mkdir(mode=0o700)
        for made in {run: None, **dict.fromkeys(members)}:
            provision.fill(made, decided)
        if where.scheduler == "slurm":
            rundir.write_bytes(run.script, sbatch.render_functions(decided, where, array=array).encode())
        ids = _hand_over({"plan": decided, "run": run, "calls": tuple(calls), "array": array}, run, decided)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    _note(run, members, ids, decided, array=array)
    return run, ids


def _note(run: RunDir, members: Sequence[RunDir], ids: Sequence[str], decided: Plan, *, array: bool) -> None:
    common: dict[str, Any] = {"submitted": time.time()}
    if decided.scheduler == "slurm":
        common |= {"slurm_job_id": int(ids[0].split("_")[0]), "cluster": commands.cluster_name()}
    for index, (member, job_id) in enumerate(zip(members, ids, strict=True)):
        own = {"array_index": index} if array and "_" in job_id else {}
        rundir.write_json(member.submitted, {**common, **own})
        if decided.scheduler == "local" and not member.owner.exists():
            rundir.claim(member, int(job_id))  # until the process below it does
    if array:
        rundir.write_json(run.submitted, {**common, "array": len(members)})


def _hand_over(request: Mapping[str, Any], run: RunDir, decided: Plan) -> list[str]:
    """Call submitit in a process with the job's environment, umask and session: none of ours changes for it.

    A local job's controller stays in that session, so that Ctrl-C or the end of this terminal doesn't reach it.
    """
    answer = run.path / "answer.json"
    words = [sys.executable, "-P", "-m", "hpcml.launch.calls", "queue", str(answer)]
    with open(run.functions / "submitit.txt", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
        try:
            subprocess.run(
                words, input=pickle.dumps(request), env=_environment(run, decided), cwd=run.path,
                stdout=log, stderr=log, start_new_session=True, timeout=QUEUE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ServiceSilent(f"the job was not queued in {QUEUE_S} s", fix="try again; squeue --me tells") from None
    told = rundir.read_json(answer)
    answer.unlink(missing_ok=True)
    if "jobs" in told:
        return list(told["jobs"])
    words_of_slurm = str(told.get("refused") or (run.functions / "submitit.txt").read_text(errors="replace"))
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in words_of_slurm.splitlines()]
    raise HpcmlError(
        f"the function was refused: {'; '.join(filter(None, lines)) or 'without a word'}",
        fix="hpcml check JOB shows what the site allows" if decided.scheduler == "slurm" else "",
    )


def _environment(run: RunDir, decided: Plan) -> dict[str, str]:
    """Return the environment to submit in: nothing of an enclosing job, and nothing that its worker had set for it."""
    environment = slurm.environment_for(run, decided)
    around = bootstrap.received(os.environ)
    if around:
        ours = {name for name, origin in around.threads.origins.items() if origin != "environment"}
        environment = {k: v for k, v in environment.items() if k not in ours | {"CUDA_VISIBLE_DEVICES"}}
    environment = {k: v for k, v in environment.items() if not k.startswith("SUBMITIT_")}
    environment["SUBMITIT_LOG_LEVEL"] = os.environ.get("SUBMITIT_LOG_LEVEL", "ERROR")
    if not environment.get("HPCML_PYTHON") and not decided.env.python:
        environment["HPCML_PYTHON"] = sys.executable
    return environment
