"""The result to come of a submitted function: waits by the run's end marker, reads submitit's pickle, or says what failed."""

import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .. import queue, rundir
from ..errors import HpcmlError, JobFailed, ServiceSilent
from ..rundir import RunDir

R = TypeVar("R")

POLL_S, POLL_MOST_S = 0.1, 1.0
# Slurm is asked at first after a second, then ever more seldom: a site has many users and one controller.
ASK_S, ASK_MOST_S = 1.0, 15.0
# A shared file system may show the end marker before the result.
RESULT_LATE_S = 5.0


class RemoteError(JobFailed):
    """A function failed, or its job ended without a result.

    Attributes:
        state: how the run ended, Slurm's long name.
        kind: type of the exception that the function raised; empty where there was none.
        remote_traceback: its traceback.
    """

    def __init__(self, what: str, *, state: str, kind: str = "", remote_traceback: str = "", fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.state, self.kind, self.remote_traceback = state, kind, remote_traceback


@dataclass(frozen=True)
class Future(Generic[R]):
    """The result to come of a submitted function. It can be pickled, and asked later from another process.

    Attributes:
        run: its run directory.
        job_id: Slurm's, of an array ``<array's id>_<index>``; on a site without a queue a process id.
        tasks: how many ranks run the function.
        function: its name.
    """

    run: RunDir
    job_id: str
    tasks: int
    function: str

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the function returned, of several tasks on rank 0. Ctrl-C leaves the job.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            RemoteError: the function raised, or the job ended without a result (TIMEOUT, OUT_OF_MEMORY, …).
            TimeoutError: it has not ended in time; the job goes on.
        """
        self._end(timeout)
        return self._value(0)

    def results(self, timeout: float | None = None) -> list[R]:
        """Wait for the end and return what the function returned on each rank, by rank; raises as ``result`` does."""
        self._end(timeout)
        return [self._value(rank) for rank in range(self.tasks)]

    def done(self) -> bool:
        """Return whether the run has ended, well or badly."""
        return self.state().is_final

    def state(self) -> queue.State:
        """Return the run's state: its end marker's, else Slurm's.

        Raises:
            ServiceSilent: Slurm gives no answer and the marker alone doesn't tell.
        """
        return queue.state_of(self.run)

    def cancel(self) -> None:
        """Cancel the job; of an array only this one. A run that has ended stays as it is."""
        queue.cancel(self.run)

    def _end(self, timeout: float | None) -> None:
        """Wait for the end: the marker is looked for often, Slurm is asked seldom."""
        began = time.monotonic()
        pause, ask_at, last = POLL_S, 0.0, "not known yet"
        while True:
            waited = time.monotonic() - began
            if waited >= ask_at or rundir.read_json(self.run.status).get("final"):
                try:
                    state = self.state()
                    if state.is_final:
                        return self._check(state)
                    last = state.name
                except ServiceSilent as error:  # the job goes on without its controller
                    last = str(error.problems[0].what)
                ask_at = waited + min(ASK_MOST_S, max(ASK_S, waited / 4))
            left = float("inf") if timeout is None else timeout - waited
            if left <= 0:
                raise TimeoutError(f"{self.function} has not ended in {timeout} s ({last}); run {self.run.id} goes on")
            time.sleep(min(pause, left))
            pause = min(POLL_MOST_S, pause * 1.2)

    def _check(self, state: queue.State) -> None:
        """Return if every rank has a result, else raise what ended it.

        A run whose end nobody knows (UNKNOWN) counts by its results.
        """
        deadline = time.monotonic() + RESULT_LATE_S
        while True:
            failed = next((r for r in range(self.tasks) if rundir.read_json(self.run.error_of(r))), None)
            complete = all(self._result_path(rank).exists() for rank in range(self.tasks))
            if failed is not None or (complete and state.name in ("COMPLETED", "UNKNOWN")):
                break
            told = state.name == "COMPLETED" or (state.name == "FAILED" and state.exit_code == 1)
            if not told or time.monotonic() > deadline:
                break
            os.listdir(self._folder)  # makes NFS look again
            time.sleep(POLL_S)
        logs = f"its logs are in {self.run.logs}: hpcml logs {self.run.id}"
        if failed is not None and state.name not in ("TIMEOUT", "CANCELLED", "OUT_OF_MEMORY"):
            error = rundir.read_json(self.run.error_of(failed))
            where = f" on rank {failed}" if self.tasks > 1 else ""
            raise RemoteError(
                f"{self.function} raised {error['type']}{where}: {error['message']}\n\n{error['traceback'].rstrip()}\n",
                state=state.name, kind=error["type"], remote_traceback=error["traceback"], fix=logs,
            )  # fmt: skip
        if not complete or state.name not in ("COMPLETED", "UNKNOWN"):
            why = f" ({state.reason})" if state.reason else ""
            what = f"{self.function} has no result: its run {self.run.id} ended as {state.name}{why}"
            raise RemoteError(what, state=state.name, fix=logs)

    def _value(self, rank: int) -> R:
        path = self._result_path(rank)
        try:
            outcome, value = pickle.loads(path.read_bytes())
            if outcome == "success":
                return pickle.loads(value)  # type: ignore[no-any-return]
        except Exception as error:
            raise HpcmlError(
                f"the result of {self.function} can't be read here: {type(error).__name__}: {error}",
                origin=str(path),
                fix="read it where the modules that it needs can be imported",
            ) from None
        # submitit itself failed around our call, such as on a call that the node's Python can't read.
        raise RemoteError(f"{self.function} did not start:\n\n{value}", state="FAILED", remote_traceback=value)

    @property
    def _folder(self) -> Path:
        return RunDir(self.run.root, self.run.id.split("/")[0]).functions

    def _result_path(self, rank: int) -> Path:
        from submitit.core.utils import JobPaths

        return Path(JobPaths(self._folder, self.job_id, rank).result_pickle)
