"""One call of a function on its way: packed here, queued through submitit, run on the node.

``Call`` is all that submitit carries. It is bytes until the worker has prepared the node, so that no framework is
imported, neither by the function nor by its arguments, before threads and devices are set.
"""

import contextlib
import fcntl
import inspect
import os
import pickle
import shlex
import signal
import site
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..job import clock
from ..node import batch, bootstrap
from ..plan import Plan, from_json
from ..rundir import RunDir
from . import local

# Local calls of one array wait for cores by polling a lock.
_POLL_S = 0.2
# submitit's own limit only catches a local call whose time limit failed: a day, for calls that wait for their turn.
_BACKSTOP_MIN = 24 * 60


@dataclass(frozen=True)
class Call:
    """A packed call; calling it on the node runs the function and returns its packed result.

    Attributes:
        python: version of the Python that packed it: code of one version can't be run by another.
        folder: working folder of whoever submitted it; the function runs there.
        paths: where whoever submitted it imports from, apart from Python's own folders.
        packed: function, arguments and keyword arguments.
    """

    python: tuple[int, int]
    folder: str
    paths: tuple[str, ...]
    packed: bytes

    def __call__(self) -> bytes:
        # submitit's handlers would requeue on USR2 and ignore TERM; the worker above us answers signals.
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        prepared = bootstrap.received(os.environ)
        error_file = batch.current_run().error_of(prepared.topology.rank if prepared else 0)
        error_file.unlink(missing_ok=True)  # of an earlier restart
        try:
            function, args, kwargs = self._unpack()
            return _packed_result(function(*args, **kwargs))
        except BaseException as error:
            trace = error.__traceback__.tb_next if error.__traceback__ else None
            text = "".join(traceback.format_exception(type(error), error, trace))
            if isinstance(error, HpcmlError):
                text = f"HpcmlError: {error}\n"
            kept = {"type": type(error).__qualname__, "message": str(error), "traceback": text}
            rundir.write_json(error_file, kept)
            print(text, end="", file=sys.stderr, flush=True)
            # Not an Exception: submitit would write and print its own account of it.
            raise SystemExit(1) from None

    def _unpack(self) -> Any:
        if self.python != sys.version_info[:2]:
            here, there = (".".join(map(str, version)) for version in (self.python, sys.version_info[:2]))
            raise HpcmlError(
                f"the function was packed by Python {here}, but {sys.executable} is Python {there}",
                fix="submit with the Python that runs it: see HPCML_PYTHON and [env]",
            )
        if not os.path.isdir(self.folder):
            raise HpcmlError(f"no folder {self.folder} on {os.uname().nodename}", fix="submit from a shared folder")
        os.chdir(self.folder)
        sys.path[:0] = [path for path in self.paths if path not in sys.path]
        return pickle.loads(self.packed)


def pack(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], project: Path) -> Call:
    """Pack a call.

    Raises:
        HpcmlError: the function or an argument can't be pickled; the argument is named.
    """
    import cloudpickle

    try:
        packed = cloudpickle.dumps((function, tuple(args), dict(kwargs)))
    except Exception:
        raise _unpicklable(function, args, kwargs) from None
    return Call(sys.version_info[:2], os.getcwd(), _import_paths(project), packed)


def _unpicklable(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> HpcmlError:
    name = name_of(function)
    try:
        bound = list(inspect.signature(function).bind_partial(*args).arguments)
    except (TypeError, ValueError):
        bound = []
    named = [bound[index] if index < len(bound) else f"number {index + 1}" for index in range(len(args))]
    for argument, value in [*zip(named, args, strict=True), *kwargs.items()]:
        if reason := _why_not(value):
            return HpcmlError(
                f"argument {argument!r} of {name} can't be pickled: {reason}",
                fix="pass what it is made from (a path, numbers) and make it inside the function",
            )
    return HpcmlError(
        f"function {name} can't be pickled: {_why_not(function) or 'not together with its arguments'}",
        fix="open files, connections and locks inside the function, not around it",
    )


def _why_not(value: object) -> str:
    import cloudpickle

    try:
        cloudpickle.dumps(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _packed_result(value: object) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise HpcmlError(
            f"the result, a {type(value).__qualname__}, can't be pickled: {type(error).__name__}: {error}",
            fix="return numbers, arrays or a path",
        ) from None


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name for people; of a partial that of its function."""
    named = getattr(function, "func", function)
    return str(getattr(named, "__qualname__", type(function).__qualname__))


def _import_paths(project: Path) -> tuple[str, ...]:
    """Return what sys.path has besides Python's own folders, and the project: its modules are imported on the node."""
    own = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    own += [*site.getsitepackages(), site.getusersitepackages()]
    entries = dict.fromkeys([*(os.path.abspath(entry) for entry in sys.path), str(project)])
    return tuple(e for e in entries if os.path.isdir(e) and not any(Path(e).is_relative_to(folder) for folder in own))


# ---------------------------------------------------------------- a process of its own, with the job's environment


def queue(request: Mapping[str, Any]) -> list[str]:
    """Give calls to submitit and return a job id for each: of several in Slurm one array.

    Args:
        request: ``plan``, ``run``, ``calls`` and ``array`` as ``functions`` made them.
    """
    import submitit

    plan, run, calls = request["plan"], request["run"], request["calls"]
    if plan.scheduler == "slurm":
        python = shlex.join(["exec", "bash", str(run.script)])
        executor = submitit.SlurmExecutor(run.functions, python=python)
        executor.update_parameters(**slurm_options(plan, run, len(calls) if request["array"] else None))
        return [str(job.job_id) for job in executor.submit_array(calls)]
    jobs = []
    try:
        for index, call in enumerate(calls):
            words = ["env", *_own_devices(), f"HPCML_RUN={run.id}" + (f"/{index}" if request["array"] else "")]
            python = shlex.join([*words, sys.executable, "-P", "-m", "hpcml.launch.calls"])
            executor = submitit.LocalExecutor(run.functions, python=python)
            executor.update_parameters(timeout_min=_BACKSTOP_MIN, signal_delay_s=0)
            jobs.append(executor.submit(call))
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return [str(job.job_id) for job in jobs]


def slurm_options(plan: Plan, run: RunDir, count: int | None) -> dict[str, object]:
    """Return a plan as parameters of submitit's Slurm executor.

    Args:
        count: number of jobs in the array, None where there is none.
    """
    slurm = plan.slurm
    output = f"{run.logs}/slurm-%j.out" if count is None else f"{run.path}/%a/logs/slurm-%A_%a.out"
    forced: dict[str, object] = {"output": output, "time": clock(plan.time_s)}
    if slurm.reservation:
        forced["reservation"] = slurm.reservation
    if count is not None:
        forced["array"] = f"0-{count - 1}"
    for option in slurm.extra:
        key, given, value = option.removeprefix("--").partition("=")
        forced[key] = value if given else True
    return {
        "job_name": plan.name,
        "time": -(-plan.time_s // 60),
        "nodes": plan.nodes,
        "ntasks_per_node": plan.tasks_per_node,
        "cpus_per_task": plan.cpus_per_task,
        "gres": plan.gres,
        "mem": f"{plan.mem_gb}G" if plan.mem_gb else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "wckey": None,  # submitit's default is one of its own, which a cluster that checks wckeys refuses
        "stderr_to_stdout": True,
        # Our script starts the step itself, passes --cpus-per-task and writes the end marker after it.
        "use_srun": False,
        # No signal of submitit's: sent up to 60 s early, it would meet a job shorter than that before its handlers.
        "signal_delay_s": 0,
        "additional_parameters": forced,
    }


def _own_devices() -> list[str]:
    """Undo submitit's CUDA_VISIBLE_DEVICES: which GPUs a local call gets is decided as for any local run."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ["-u", "CUDA_VISIBLE_DEVICES"] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]


def run_here() -> int:
    """Run the call that the environment names with local workers, when enough cores are free among its array's calls."""
    run = batch.current_run()
    plan = from_json(rundir.read_json(run.plan))
    rundir.claim(run)
    at_once = max(1, len(os.sched_getaffinity(0)) // plan.cores)
    with _turn(RunDir(run.root, run.id.split("/")[0]).functions, at_once):
        marker = local.run(plan, run)
    return int(str(marker["exit_code"]))


@contextlib.contextmanager
def _turn(folder: Path, at_once: int) -> Iterator[None]:
    """Wait until fewer than ``at_once`` others hold a lock in the folder, and hold one; a process's end frees its own."""
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(open(folder / f"turn.{index}.lock", "w")) for index in range(at_once)]
        while True:
            for lock in locks:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield
                    return
            time.sleep(_POLL_S)


def main() -> int:
    """``queue ANSWER`` queues the request on stdin; else run the call that the environment names."""
    os.umask(0o077)
    if sys.argv[1:2] != ["queue"]:
        return run_here()
    answer = Path(sys.argv[2])
    try:
        rundir.write_json(answer, {"jobs": queue(pickle.load(sys.stdin.buffer))})
        return 0
    except Exception as error:
        rundir.write_json(answer, {"refused": str(error) or type(error).__name__})
        return 1


if __name__ == "__main__":
    sys.exit(main())
