"""``hpcml.begin()`` and the ``Run`` it returns: what notebooks and scripts import.

``begin`` works the same under hpcml, a bare ``srun``, ipython and JupyterLab. Under hpcml the worker has prepared
threads, TF_CONFIG, devices and the Keras flavour; elsewhere ``begin`` does it, before TensorFlow is imported.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import facts, rundir
from . import site as sites
from .errors import HpcmlError
from .job import NAME_PATTERN, Environment, Scalar, SlurmOptions, project_of
from .node import batch, bootstrap
from .node.devices import Devices
from .node.topology import Topology
from .plan import NEVER_CHECKED, Plan, from_json
from .rundir import RunDir
from .slurm import commands
from .tracking.journal import Journal

TENSORFLOW_STRATEGIES = ("original", "mirrored", "multiworker")
_FRAMEWORKS = ("tensorflow", "keras", "tf_keras")
# A bare run delivers when it ends; a server that is away must not hold the shell longer than this.
DELIVERY_S = 60
# Ranks of one training end within moments of each other.
OTHERS_S = 30

_current: "Run | None" = None


@dataclass
class Run:
    """A run in progress, as seen by one rank.

    Attributes:
        dir: its run directory.
        strategy: the strategy it was begun with, None for none.
        topology: this rank among all.
        devices: the devices of this rank.
        params: the job's parameters laid over the work's defaults.
        precision: Keras's mixed precision policy.
        bare: whether no worker started it; it then writes its own end marker.
    """

    dir: RunDir
    strategy: str | None
    topology: Topology
    devices: Devices
    params: Mapping[str, Scalar | None]
    precision: str
    bare: bool
    journal: Journal
    began: float = field(default_factory=time.perf_counter)
    started: float = field(default_factory=time.time)
    finished: bool = False

    def log(self, step: int, **metrics: float) -> bool:
        """Record metrics of a step in the run's journal; returns False where they could not be kept. Never raises."""
        try:
            return self.journal.metric(step, metrics)
        except (TypeError, ValueError) as error:
            print(f"hpcml: warning: not recorded: {error}", file=sys.stderr)
            return False

    def callbacks(self, global_batch: int | None = None) -> list[Any]:
        """Return the Keras callbacks of this run, for ``model.fit(callbacks=…)``.

        They check the replicas in sync when training begins, and record each epoch.

        Args:
            global_batch: samples a step over all replicas; by default the parameter of that name.

        Raises:
            HpcmlError: the global batch is known from neither, or the run was begun without a strategy.
        """
        batch_size = global_batch if global_batch is not None else self.params.get("global_batch")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise HpcmlError(
                f"global_batch = {batch_size!r} is no number of samples", fix="run.callbacks(global_batch=…)"
            )
        from .training import tensorflow

        return tensorflow.callbacks(
            self.journal, self._expected(), global_batch=batch_size, began=self.began, rank=self.topology.rank
        )

    def finish(self, state: str = "COMPLETED", reason: str = "") -> None:
        """End the run. A bare run writes its end marker and delivers to MLflow; under hpcml the worker does both."""
        global _current
        if self.finished:
            return
        self.finished = True
        self.journal.write("finish", state=state, reason=reason)
        self.journal.close()
        _current = None if _current is self else _current
        if self.bare:
            if state == "COMPLETED" and self.strategy and not self._was_checked():
                state, reason = "FAILED", NEVER_CHECKED.format(strategy=self.strategy)
                print(f"hpcml: {reason}", file=sys.stderr, flush=True)
            self._mark(state, reason)
            if self.topology.rank == 0:
                _deliver(self.dir)

    def _was_checked(self) -> bool:
        rank = self.topology.rank
        return any(r["kind"] == "replicas" and r["rank"] == rank for r in _records(self.dir))

    def _expected(self) -> Any:
        from .training import tensorflow

        if self.strategy is None:
            raise HpcmlError("the run was begun without a strategy", fix='hpcml.begin(strategy="original")')
        return tensorflow.Expected(
            strategy=self.strategy,
            world=self.topology.world,
            gpus_per_task=len(self.devices.gpus),
            virtual=not self.devices.gpus,
            virtual_devices=max(1, self.devices.virtual),
        )

    def _mark(self, state: str, reason: str) -> None:
        code = 0 if state == "COMPLETED" else 1
        rank = {"rank": self.topology.rank, "exit_code": code, "reason": reason, "restart": _restart()}
        mine = (r for r in _records(self.dir) if r["kind"] == "replicas" and r["rank"] == self.topology.rank)
        replicas = next((r["in_sync"] for r in mine), None)
        times = {"started": self.started, "ended": time.time()}
        rundir.write_json(self.dir.status_of(self.topology.rank), {**rank, "replicas_in_sync": replicas, **times})
        if self.topology.rank == 0:
            missing = self._wait_for_others()
            marker = batch.close_run(self.dir, code)
            if missing:
                text = f"rank {missing[0]} gave no end marker within {OTHERS_S} s of rank 0's"
                marker |= {"state": "FAILED", "exit_code": 1, "reason": marker["reason"] or text}
                rundir.write_json(self.dir.status, marker)
            print(f"hpcml: run {self.dir.id} · {marker['state']} · {self.dir.path}", flush=True)

    def _wait_for_others(self) -> list[int]:
        """Wait, bounded, until the other ranks of a bare run have left their markers; returns those that have not."""
        deadline = time.monotonic() + OTHERS_S
        while True:
            ended = [rundir.read_json(self.dir.status_of(rank)) for rank in range(self.topology.world)]
            missing = [rank for rank, marker in enumerate(ended) if marker.get("restart", -1) != _restart()]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


def begin(strategy: str | None = None, *, new: bool = False) -> Run:
    """Begin a run: threads, TF_CONFIG, devices, Keras flavour and run directory, before TensorFlow is imported.

    Args:
        strategy: ``original``, ``mirrored`` or ``multiworker``: the number of replicas is then checked when training
            begins. None only records.
        new: end the current run and begin another; without it a second call returns the same run.

    Raises:
        HpcmlError: TensorFlow was imported before; the job names another strategy; devices that were given can't be
            used.
    """
    global _current
    if _current is not None and not new:
        if strategy not in (None, _current.strategy):
            raise HpcmlError(
                f"the current run was begun with strategy {_current.strategy!r}, not {strategy!r}",
                fix="restart the kernel, or hpcml.begin(strategy=…, new=True)",
            )
        return _current
    first = _current is None and not _begun_before()
    if _current is not None:
        _current.finish()
    if strategy not in (None, *TENSORFLOW_STRATEGIES):
        raise HpcmlError(f"unknown strategy {strategy!r}", origin="begin()", allowed=", ".join(TENSORFLOW_STRATEGIES))
    if first and (imported := [name for name in _FRAMEWORKS if name in sys.modules]):
        raise HpcmlError(
            f"{imported[0]} was imported before hpcml.begin(), so threads and devices can't be set any more",
            fix="restart the kernel, and call hpcml.begin() before the framework is imported",
        )
    prepared = bootstrap.received(os.environ)
    run = _under_worker(strategy, prepared) if prepared and not new else _bare(strategy)
    _current = run
    _BEGUN.append(run.dir.id)
    if run.strategy is not None and first:
        from .training import tensorflow

        tensorflow.configure(run._expected(), precision=run.precision)
    return run


_BEGUN: list[str] = []


def _begun_before() -> bool:
    return bool(_BEGUN)


def _under_worker(strategy: str | None, prepared: bootstrap.Bootstrap) -> Run:
    run_dir = batch.current_run()
    plan = from_json(rundir.read_json(run_dir.plan))
    if None not in (strategy, plan.strategy) and strategy != plan.strategy:
        raise HpcmlError(
            f"the work begins with strategy {strategy!r}, the job says {plan.strategy!r}",
            origin=plan.origins.get("strategy", plan.job_file or "the job"),
            fix="make them agree",
        )
    rank = prepared.topology.rank
    journal = Journal(run_dir.event_file(rank, _restart(), "rank"))
    _record_facts(journal, prepared)
    chosen = plan.strategy or strategy
    return Run(
        run_dir, chosen, prepared.topology, prepared.devices, plan.effective_params, plan.precision, False, journal
    )


def _bare(strategy: str | None) -> Run:
    """A run that nobody prepared: ipython, JupyterLab, a bare srun, torchrun."""
    where, _ = sites.choose(None, commands.cluster_name())
    script = _script()
    folder = project_of(script if script else Path.cwd() / "session.py")
    decided = _session_plan(strategy, where, script, folder)
    prepared = bootstrap.prepare(os.environ, strategy, decided.keras)
    os.environ.update({k: v for k, v in prepared.variables.items() if k != bootstrap.HANDOVER})
    place = prepared.topology
    root = rundir.runs_root(where, folder)
    if place.world == 1:
        run_dir = rundir.create(root, decided.name)
    else:
        run_dir = rundir.adopt(root, _shared_id(root, decided.name, place))
    if place.rank == 0:
        rundir.write_json(run_dir.plan, decided.to_json())
        rundir.claim(run_dir)
        if os.environ.get("SLURM_JOB_ID"):
            rundir.write_json(
                run_dir.submitted, {"slurm_job_id": int(os.environ["SLURM_JOB_ID"]), "submitted": time.time()}
            )
    print(f"hpcml: run {run_dir.id} · {strategy or 'no strategy'} · {prepared.describe()}", flush=True)
    journal = Journal(run_dir.event_file(place.rank, _restart(), "rank"))
    _record_facts(journal, prepared)
    run = Run(run_dir, strategy, place, prepared.devices, decided.effective_params, decided.precision, True, journal)
    atexit.register(_finish_at_exit, run, getattr(sys, "last_value", None))
    return run


def _session_plan(strategy: str | None, where: sites.Site, script: Path | None, folder: Path) -> Plan:
    """Describe a bare run by what can be known of it, so that every run directory reads alike."""
    name = script.stem if script and NAME_PATTERN.fullmatch(script.stem) else "session"
    declared = facts.declared_parameters(script) if script and script.suffix == ".py" else None
    cores = len(os.sched_getaffinity(0))
    return Plan(
        name=name, site=where.name, scheduler=where.scheduler, work="session",
        target=(os.path.relpath(script, folder),) if script else (), project=str(folder), job_file=None,
        strategy=strategy, keras="legacy", precision="float32", experiment=name,
        nodes=int(os.environ.get("SLURM_STEP_NUM_NODES", "1")), gpus_per_node=0,
        tasks_per_node=1, cpus_per_task=int(os.environ.get("SLURM_CPUS_PER_TASK") or cores),
        mem_gb=None, time_s=0, gres=None, slurm=SlurmOptions(), env=Environment(), params={},
        defaults=declared.defaults if declared else {}, inject=False, notes=(), origins={},
    )  # fmt: skip


def _script() -> Path | None:
    """The file being run, also by ipython; None in a notebook or at a prompt."""
    main = sys.modules.get("__main__")
    name = getattr(main, "__file__", None) or (sys.argv[0] if sys.argv[0].endswith(".py") else None)
    if name is None or "ipykernel" in sys.modules:
        return None
    if Path(name).name in ("ipython", "ipython3"):
        name = next((word for word in sys.argv[1:] if word.endswith((".py", ".ipy"))), None)
    return Path(name).absolute() if name and Path(name).is_file() else None


def _shared_id(root: Path, name: str, place: Topology) -> str:
    """The same id on every rank: the job's id and step with the time of submission, else the starter's own run id."""
    nth = f"-{len(_BEGUN) + 1}" if _BEGUN else ""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "0")
    if os.environ.get("HPCML_RUN"):  # under hpcml, after the run that the worker prepared
        return f"{os.environ['HPCML_RUN'].replace('/', '-')}{nth}"
    if job:
        ending = f"-{name}-j{job}.{step}{nth}"
        earlier = sorted(root.glob(f"*{ending}")) if _restart() else []  # a requeue changes the time of submission
        when = commands.job_fields(int(job)).get("SubmitTime", "").replace("-", "").replace("T", "-").replace(":", "")
        return earlier[-1].name if earlier else f"{when or '00000000-000000'}{ending}"
    parent = os.getppid()  # torchrun's agent or mpirun's daemon: one for all ranks of a node
    when = time.strftime("%Y%m%d-%H%M%S", time.localtime(rundir.started_at(parent)))
    return f"{when}-{name}-{place.source.replace(' ', '')}-{parent}{nth}"


def _record_facts(journal: Journal, prepared: bootstrap.Bootstrap) -> None:
    journal.write("params", values={**prepared.facts(), "python": sys.version.split()[0], "host": os.uname().nodename})


def _records(run_dir: RunDir) -> list[dict[str, Any]]:
    from .tracking import journal

    return list(journal.read(run_dir.events))


def _restart() -> int:
    return int(os.environ.get("HPCML_RESTART") or os.environ.get("SLURM_RESTART_COUNT") or 0)


def _finish_at_exit(run: Run, before: BaseException | None) -> None:
    """End a bare run with its process: FAILED where an exception came since ``begin()`` that nobody caught."""
    if run.finished:
        return
    error = getattr(sys, "last_value", None)
    if error is not None and error is not before:
        run.finish("FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        run.finish()


def _deliver(run_dir: RunDir) -> None:
    """Deliver in a process of its own, so that MLflow's imports, threads and failures stay out of this one."""
    with contextlib.suppress(OSError):
        words = [sys.executable, "-m", "hpcml.cli", "sync", run_dir.id]
        environment = {**os.environ, "HPCML_RUNS": str(run_dir.root)}
        try:
            done = subprocess.run(words, env=environment, timeout=DELIVERY_S, check=False, stdin=subprocess.DEVNULL)
            silent = done.returncode != 0
        except subprocess.TimeoutExpired:
            silent = True
        if silent:
            print(f"hpcml: not delivered to MLflow; nothing is lost: hpcml sync {run_dir.id}", file=sys.stderr)
