"""``hpcml.begin()``: threads, TF_CONFIG, devices, Keras flavour and run directory, before a framework is imported.

It works the same under hpcml, a bare ``srun``, ipython and JupyterLab. Under hpcml the worker has prepared all that;
elsewhere ``begin`` does it.
"""

import atexit
import os
import sys

from . import bare, rundir
from .errors import INTERRUPTED, HpcmlError
from .job import STRATEGIES
from .node import batch, bootstrap, exits, plainly
from .plan import from_json
from .run import Run
from .tracking import heartbeat, provenance
from .tracking.journal import Journal

_TENSORFLOW = ("tensorflow", "keras", "tf_keras")
_FRAMEWORKS = {"ddp": ("torch",), "horovod": ("horovod", "torch", *_TENSORFLOW)}

# The runs that this process has begun, the newest last.
_begun: list[Run] = []


@plainly.refusing
def begin(strategy: str | None = None, *, new: bool = False) -> Run:
    """Begin a run: threads, TF_CONFIG, devices, Keras flavour and run directory, before TensorFlow is imported.

    Args:
        strategy: ``original``, ``mirrored``, ``multiworker``, ``ddp`` or ``horovod``: that all replicas train one model
            is then checked when training begins. None only records.
        new: end the current run and begin another; without it a second call returns the same run.

    Raises:
        HpcmlError: TensorFlow was imported before; the job names another strategy; devices that were given can't be
            used.
    """
    current = _begun[-1] if _begun and not _begun[-1].finished else None
    if current is not None and not new:
        if strategy not in (None, current.strategy):
            raise HpcmlError(
                f"the current run was begun with strategy {current.strategy!r}, not {strategy!r}",
                fix="restart the kernel, or hpcml.begin(strategy=…, new=True)",
            )
        return current
    if current is not None:
        current.finish()
    if strategy not in (None, *STRATEGIES):
        raise HpcmlError(f"unknown strategy {strategy!r}", origin="begin()", allowed=", ".join(STRATEGIES))
    frameworks = _FRAMEWORKS.get(strategy or "", _TENSORFLOW)
    if not _begun and (imported := [name for name in frameworks if name in sys.modules]):
        raise HpcmlError(
            f"{imported[0]} was imported before hpcml.begin(), so threads and devices can't be set any more",
            fix="restart the kernel, and call hpcml.begin() before the framework is imported",
        )
    prepared = bootstrap.received(os.environ)
    run = _under_worker(strategy, prepared) if prepared and not new else _bare(strategy)
    if run.strategy is not None and not _begun:
        try:
            _configure(run, run.strategy)
        except HpcmlError as error:
            run.finish("FAILED", str(error).splitlines()[0])
            raise
    _begun.append(run)
    return run


def _configure(run: Run, strategy: str) -> None:
    """Give the framework its threads and devices, once in a process."""
    if strategy == "ddp":
        from .training import torch

        torch.configure(run.expected(), os.environ)
    elif strategy == "horovod":
        from .training import horovod

        horovod.begin(run.expected(), run.topology.rank, run.dir.id, os.environ, precision=run.precision)
    else:
        from .training import tensorflow

        tensorflow.configure(run.expected(), precision=run.precision)


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
    heartbeat.begin()
    writer = Journal(run_dir.event_file(rank, _restart(), "rank"))
    chosen = plan.strategy or strategy
    _record_facts(writer, prepared, chosen)
    atexit.register(writer.close)  # work that never calls finish()
    tuning = plan.tuning.given
    if "data_threads" in tuning:
        tuning["data_threads"] = min(int(tuning["data_threads"]), prepared.threads.cores - 1)
    return Run(
        run_dir, chosen, prepared.topology, prepared.devices, plan.effective_params, plan.precision, writer,
        restart=_restart(), profile=plan.profile, tuning=tuning,
    )  # fmt: skip


def _bare(strategy: str | None) -> Run:
    """A run that nobody prepared: ipython, JupyterLab, a bare srun, torchrun."""
    held = bare.begin(strategy, _restart(), len(_begun))
    writer = Journal(held.dir.event_file(held.ready.topology.rank, held.restart, "rank"))
    _record_facts(writer, held.ready, strategy)
    run = Run(
        held.dir, strategy, held.ready.topology, held.ready.devices, held.plan.effective_params, held.plan.precision,
        writer, restart=held.restart, session=held,
    )  # fmt: skip
    exits.watch()
    atexit.register(_finish_at_exit, run, getattr(sys, "last_value", None), os.getpid())
    return run


def _record_facts(writer: Journal, prepared: bootstrap.Bootstrap, strategy: str | None) -> None:
    writer.write(
        "params",
        values={
            **prepared.facts(),
            **provenance.node_facts(os.environ, prepared.devices.gpus),
            "python": sys.version.split()[0],
            "host": os.uname().nodename,
            **({"strategy": strategy} if strategy else {}),
        },
    )


def _restart() -> int:
    return int(os.environ.get("HPCML_RESTART") or rundir.restart_of(os.environ))


def _finish_at_exit(run: Run, before: BaseException | None, pid: int) -> None:
    """End a bare run with its process: FAILED where it exits with another code than 0.

    That is an exception since ``begin()`` that nobody caught, or ``sys.exit``; ``raise SystemExit(3)`` goes unseen.
    """
    if run.finished or pid != os.getpid():  # a forked child's end is not the run's
        return
    error = getattr(sys, "last_value", None)
    if isinstance(error, KeyboardInterrupt) and error is not before:
        run.end("CANCELLED", "interrupted", INTERRUPTED)
        return
    if error is not None and error is not before:
        run.finish("FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    code = exits.code()
    status = code & 0xFF if isinstance(code, int) else int(code is not None)  # as Python's own end takes it
    if status:
        run.end("FAILED", str(code)[:300] if not isinstance(code, int) else f"exit code {status}", status)
    else:
        run.finish()
