"""One trial: the job itself, run as ``hpcml run`` runs it, until enough epochs after the first were measured.

    python -m hpcml.tune.trial RUN_ROOT RUN_ID

is the launcher of one trial. It ends the trial when its standard input closes: at the tuner's wish, and with the tuner.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import rundir, snapshot
from ..launch import local
from ..plan import Plan, from_json
from ..rundir import RunDir
from ..tracking import journal

FOLDER = "tune"  # below the runs folder
POLL_S = 0.1
# Where the work has a parameter epochs: never reached, for a trial is ended from outside.
EPOCHS = 10_000
# A trial is not called slow by fewer epochs.
LEAST_EPOCHS = 2
# The launcher gives the ranks local.GRACE_S to end; then it is killed itself.
END_S = local.GRACE_S + 10
_LATE = "no second epoch within"
# What a trial leaves and nobody reads.
_LEAVINGS = ("code", "checkpoints", "model", "artifacts", "profile")


@dataclass
class Pace:
    """What a trial's journal told so far.

    Attributes:
        speeds: samples/s of each epoch after the first.
        trained_s: seconds that these took; ``steps``, ``step_s``: of the newest.
        first: whether the first epoch is over.
        facts: the ``params`` records of rank 0.
        replicas: in sync.
    """

    speeds: list[float] = field(default_factory=list)
    trained_s: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    first: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    replicas: int = 1

    def take(self, record: Mapping[str, Any]) -> None:
        """Take up a record of the journal; what other ranks tell of the same epochs counts once."""
        if record["rank"]:
            return
        values = record.get("values")
        if record["kind"] == "replicas":
            self.replicas = max(1, int(record["in_sync"]))
        elif not isinstance(values, dict):
            return
        elif record["kind"] == "params":
            self.facts |= values
        elif "samples_per_s" in values:
            if record["step"] <= 1:  # holds the building of the graph
                self.first = True
                return
            self.speeds.append(float(values["samples_per_s"]))
            took_s = float(values.get("epoch_time_s", 0.0))
            self.trained_s += took_s
            self.step_s = float(values.get("step_time_ms", 0.0)) / 1000
            self.steps = round(took_s / self.step_s) if self.step_s else 0

    @property
    def speed(self) -> float | None:
        """The median of the epochs; None without one."""
        return statistics.median(self.speeds) if self.speeds else None


@dataclass(frozen=True)
class Outcome:
    """How one trial went; ``reason`` where it was no success, or was ended: too slow (``cut``), no epoch in time (``late``)."""

    run: RunDir
    pace: Pace
    wall_s: float
    reason: str = ""
    cut: bool = False

    @property
    def late(self) -> bool:
        """Whether its time was up before an epoch was measured."""
        return self.reason.startswith(_LATE)


class Trials:
    """Runs trials of one job, one after the other, all with the code as it was when the first was prepared."""

    def __init__(self, plan: Plan, root: Path) -> None:
        """Make the folder of this tuning and copy the project.

        Args:
            root: the runs folder.

        Raises:
            HpcmlError: the folder can't be made, or the project not be copied.
        """
        self.plan, self.root, self.count = plan, root, 0
        self.folder = rundir.create(root / FOLDER, plan.name).path
        for made in ("logs", "events"):
            (self.folder / made).rmdir()  # it is no run
        work = plan.target[0] if plan.work in ("notebook", "script") else None
        self._code = self.folder / "code"
        try:
            snapshot.take(Path(plan.project), self._code, skip=root, work=work)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def run(
        self, plan: Plan, seconds: float, below: float, limit_s: float, tell: Callable[[Pace], None] = lambda pace: None
    ) -> Outcome:
        """Run one trial.

        Args:
            seconds: of training, after the first epoch, that are enough.
            below: samples/s; ended early where the best epoch is slower.
            limit_s: for the whole trial.
            tell: called as epochs end.
        """
        self.count += 1
        run = RunDir(self.root, f"{FOLDER}/{self.folder.name}/{self.count:02d}").make()
        began = time.monotonic()
        try:
            self._prepare(run, plan, limit_s)
            pace, reason, cut = _watched(run, seconds, below, limit_s, tell)
        finally:
            for name in _LEAVINGS:
                shutil.rmtree(run.path / name, ignore_errors=True)
        return Outcome(run, pace, time.monotonic() - began, reason, cut)

    def close(self) -> None:
        """Remove the copy of the project."""
        shutil.rmtree(self._code, ignore_errors=True)

    def _prepare(self, run: RunDir, plan: Plan, limit_s: float) -> None:
        params = dict(plan.params)
        if isinstance(plan.effective_params.get("epochs"), int):
            params["epochs"] = EPOCHS
        variables = {**plan.env.vars, "MLFLOW_TRACKING_URI": _nowhere(run)}  # also for work that calls MLflow itself
        env = dataclasses.replace(plan.env, vars=variables)
        # The limit is kept here; the launcher's own is for a tuner that hangs.
        slurm = dataclasses.replace(plan.slurm, max_requeues=0)  # a trial that is cut short is no job to be resumed
        plan = dataclasses.replace(plan, params=params, env=env, slurm=slurm, profile=None, time_s=round(limit_s) + 60)
        shutil.copytree(self._code, run.code, symlinks=True)
        if plan.work == "script" and plan.inject and plan.params:
            snapshot.inject(run.code / plan.target[0], plan.params)
        rundir.write_json(run.plan, plan.to_json())


def _nowhere(run: RunDir) -> str:
    """An address of MLflow's that no job delivers to: a file in the trial's own folder."""
    return f"sqlite:///{run.path}/mlflow.db"


def _watched(
    run: RunDir, seconds: float, below: float, limit_s: float, tell: Callable[[Pace], None]
) -> tuple[Pace, str, bool]:
    """Start the launcher, follow the journal until there is enough, end it; what it told, and why it is a bad point."""
    pace, reader = Pace(), journal.Reader(run.events, kinds={"metric", "params", "replicas"})
    words = [sys.executable, "-P", "-m", __name__, str(run.root), run.id]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": _nowhere(run)}
    deadline = time.monotonic() + limit_s
    with (run.logs / "launcher.txt").open("wb") as log:
        child = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while True:
            ended = child.poll() is not None  # before reading: what it wrote last counts
            known = len(pace.speeds), pace.first
            for record in reader.new():
                pace.take(record)
            if (len(pace.speeds), pace.first) != known:
                tell(pace)
            if pace.speeds and pace.trained_s >= seconds:
                return pace, "", False
            if len(pace.speeds) >= LEAST_EPOCHS and max(pace.speeds) < below:
                return pace, "clearly slower", True
            if ended:
                return pace, _why(run, child.returncode), False
            if time.monotonic() > deadline:
                return pace, "" if pace.speeds else f"{_LATE} {limit_s:.0f} s", False
            time.sleep(POLL_S)
    finally:
        _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _why(run: RunDir, code: int) -> str:
    """Why a trial that ended by itself failed; empty where it came to its end."""
    if code == 0:
        return ""
    reason = str(rundir.read_json(run.status).get("reason") or "")
    lines = [
        line for log in (run.log(0), run.logs / "launcher.txt") for line in rundir.last_lines(log, 20) if line.strip()
    ]
    if not reason or reason.startswith("exit code"):
        reason = next((line.strip() for line in reversed(lines) if "Error" in line), reason)
    return reason or f"exit code {code}"


def main() -> int:
    """Launch the trial that the arguments name."""
    run = RunDir(Path(sys.argv[1]), sys.argv[2])
    os.umask(0o077)
    threading.Thread(target=_end_with_the_tuner, daemon=True).start()
    marker = local.run(from_json(rundir.read_json(run.plan)), run)
    code = marker["exit_code"]
    return code if isinstance(code, int) else 1


def _end_with_the_tuner() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
