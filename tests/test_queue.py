"""A run's state: its own marker, then Slurm's word, then the clock; each kind of end is kept apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcml import queue, rundir
from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.node import batch
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal

INVALID = "slurm_load_jobs error: Invalid job id specified"
LIMIT_S = 1800


class Slurm:
    """Stubs of Slurm's commands as all that is on PATH; what they say can be changed between calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for tool in ("cat", "sh"):
            (folder / tool).symlink_to(shutil.which(tool) or "")
        self.forget()

    def say(self, command: str, out: str = "", err: str = "", code: int = 0) -> None:
        for stream, text in (("out", out), ("err", err)):
            (self.folder / f"{command}.{stream}").write_text(text and f"{text}\n")
        path, new = self.folder / command, self.folder / f"{command}.new"
        log = f'echo "{command} $*" >>{self.folder}/asked'
        new.write_text(f"#!/bin/sh\n{log}\ncat {path}.out\ncat {path}.err >&2\nexit {code}\n")
        new.chmod(0o755)
        new.rename(path)

    def forget(self) -> None:
        """Know no job, and have no accounting."""
        for command in ("squeue", "scontrol"):
            self.say(command, err=INVALID, code=1)
        self.say("sacct", err="Slurm accounting storage is disabled", code=1)
        self.say("scancel")

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    stubs = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(stubs.folder))
    return stubs


def make(root: Path, job_id: int | None = 7, *, ago_s: float = 60, name: str = "a") -> RunDir:
    """A run that was submitted some seconds ago."""
    run = rundir.create(root / "runs", name)
    rundir.write_json(run.plan, {"name": name, "time_s": LIMIT_S})
    if job_id is not None:
        rundir.write_json(run.submitted, {"slurm_job_id": job_id, "submitted": time.time() - ago_s})
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make(tmp_path)


def rank_ended(run: RunDir, rank: int, code: int, *, lasted_s: float = 30, restart: int = 0, reason: str = "") -> None:
    now = time.time()
    marker = {"rank": rank, "exit_code": code, "reason": reason, "replicas_in_sync": 2, "restart": restart}
    rundir.write_json(run.status_of(rank), {**marker, "started": now - lasted_s, "ended": now})


def stopped(run: RunDir, signal: str = "SIGTERM", *, ago_s: float = 1, restart: int = 0) -> None:
    rundir.write_json(run.stop, {"signal": signal, "time": time.time() - ago_s, "restart": restart})


# ------------------------------------------------------------------ the ladder


@pytest.mark.parametrize(
    "state", ["TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "CANCELLED", "FAILED", "BOOT_FAIL", "DEADLINE"]
)
@pytest.mark.parametrize("command", ["squeue", "scontrol", "sacct"])
@pytest.mark.parametrize("marked", [True, False])
def test_each_end_is_kept_apart_whoever_tells_it(
    slurm: Slurm, run: RunDir, state: str, command: str, marked: bool
) -> None:
    told = {
        "squeue": f"{state}|None",
        "scontrol": f"JobId=7 JobName=a JobState={state} Reason=None ExitCode=0:15 WorkDir=/p",
        "sacct": f"{state} by 0|0:15" if state == "CANCELLED" else f"{state}|0:15",
    }
    slurm.say(command, told[command])
    if marked:
        rank_ended(run, 0, 143)
        stopped(run)
        batch.close_run(run, 143)
    got = queue.state_of(run)
    assert (got.name, got.source, got.slurm_job_id, got.is_final) == (state, command, 7, True)
    slurm.forget()
    assert queue.state_of(run).name == state, "it is kept when Slurm forgets the job"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "CONFIGURING"])
def test_what_goes_on_goes_on(slurm: Slurm, run: RunDir, state: str) -> None:
    slurm.say("squeue", f"{state}|Priority")
    got = queue.state_of(run)
    assert (got.name, got.reason, got.is_final) == (state, "Priority", False)


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (3, "FAILED")])
def test_a_final_marker_is_believed(slurm: Slurm, run: RunDir, code: int, state: str) -> None:
    slurm.say("squeue", "RUNNING|None")
    rank_ended(run, 0, code, reason="ValueError: no" if code else "")
    batch.close_run(run, code)
    got = queue.state_of(run)
    assert (got.name, got.source, got.exit_code, got.replicas_in_sync) == (state, "marker", code, 2)
    assert got.reason == ("ValueError: no" if code else "")
    if state == "COMPLETED":
        assert slurm.asked() == [], "only who failed may have been put back into the queue"


@pytest.mark.parametrize(
    ("ranks", "stop", "code", "signal", "final"),
    [
        pytest.param([0, 0], False, 0, "", True, id="completed"),
        pytest.param([1, 143], False, 1, "TERM", True, id="failed by itself, the others cleared away"),
        pytest.param([143, 143], True, 143, "TERM", False, id="stopped by a signal"),
        pytest.param([137], False, 137, "", False, id="killed: perhaps out of memory"),
        pytest.param([], False, 1, "", True, id="srun could not start"),
        pytest.param([], False, 143, "TERM", False, id="a signal before any rank ended"),
    ],
)
def test_when_the_marker_decides(
    run: RunDir, ranks: list[int], stop: bool, code: int, signal: str, final: bool
) -> None:
    for rank, exit_code in enumerate(ranks):
        rank_ended(run, rank, exit_code)
    if stop:
        stopped(run)
    assert batch.close_run(run, code, signal or None)["final"] is final


def test_the_first_rank_that_failed_gives_code_and_reason(run: RunDir) -> None:
    rank_ended(run, 1, 5, reason="the cause")
    rank_ended(run, 0, 143, reason="the consequence")
    marker = batch.close_run(run, 143, "TERM")
    assert (marker["exit_code"], marker["reason"], marker["failed_rank"]) == (5, "the cause", 1)


# ------------------------------------------------------------------ restarts


def test_what_an_earlier_restart_left_is_ignored(slurm: Slurm, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_ended(run, 0, 1, reason="the first time")
    rank_ended(run, 1, 1)
    stopped(run)
    batch.close_run(run, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    batch.forget_earlier(run, 1)
    slurm.say("squeue", "RUNNING|None")
    assert (queue.state_of(run).name, queue.state_of(run).ended) == ("RUNNING", None)
    rank_ended(run, 0, 0, restart=1)
    marker = batch.close_run(run, 0)
    assert (marker["state"], marker["final"], marker["restarts"]) == ("COMPLETED", True, 1)
    assert queue.state_of(run).name == "COMPLETED"


@pytest.mark.parametrize("restart", [0, 1])
def test_a_marker_of_this_restart_stays(run: RunDir, restart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    batch.close_run(run, 0)
    batch.forget_earlier(run, restart)
    assert run.status.exists()


def fail(run: RunDir, restart: int = 0) -> None:
    rank_ended(run, 0, 3, reason="the first time", restart=restart)
    batch.close_run(run, 3)


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_failed_job_that_waits_again_has_not_failed(slurm: Slurm, run: RunDir, state: str) -> None:
    fail(run)
    slurm.say("squeue", f"{state}|BeginTime|2037-01-02T03:04:05|7")
    got = queue.state_of(run)
    assert (got.name, got.reason, got.is_final, got.ended, got.replicas_in_sync) == (
        state, "BeginTime", False, None, None,
    )  # fmt: skip
    assert got.expected_start == time.mktime((2037, 1, 2, 3, 4, 5, 0, 0, -1))
    (listed,), silence = queue.states_of([run])
    assert (listed.name, silence) == (state, None)


@pytest.mark.parametrize(("restarts", "expected"), [(0, "FAILED"), (1, "RUNNING")])
def test_a_failed_job_that_runs_again_is_told_by_its_restarts(
    slurm: Slurm, run: RunDir, restarts: int, expected: str
) -> None:
    """Between its marker and its end Slurm still says RUNNING; only a restart tells the two apart."""
    fail(run)
    slurm.say("squeue", "RUNNING|None|2026-01-02T03:04:05|7")
    slurm.say("scontrol", f"JobId=7 JobName=a JobState=RUNNING Reason=None Restarts={restarts} ExitCode=0:0")
    assert queue.state_of(run).name == expected


def test_a_failed_run_is_told_without_slurm(slurm: Slurm, run: RunDir) -> None:
    fail(run)
    slurm.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert queue.state_of(run).name == "FAILED"
    for command in ("squeue", "scontrol", "sacct"):
        (slurm.folder / command).unlink()
    assert queue.state_of(run).name == "FAILED"


def test_a_running_job_began_when_slurm_says(slurm: Slurm, run: RunDir) -> None:
    slurm.say("squeue", "RUNNING|None|2026-01-02T03:04:05|7")
    assert queue.state_of(run).started == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))


# ------------------------------------------------------------------ many runs at once


def test_many_runs_cost_one_question(slurm: Slurm, tmp_path: Path) -> None:
    runs = [make(tmp_path, job_id) for job_id in (11, 12, 13, 14)]
    batch.close_run(runs[3], 0)
    slurm.say("squeue", "RUNNING|None|2026-01-02T03:04:05|11\nPENDING|Priority|N/A|12")
    slurm.say("sacct", "13|TIMEOUT|0:0")
    states, silence = queue.states_of(runs)
    assert [state.name for state in states] == ["RUNNING", "PENDING", "TIMEOUT", "COMPLETED"] and silence is None
    assert [line.split()[0] for line in slurm.asked()] == ["squeue", "sacct"]
    assert "--jobs=11,12,13 " in f"{slurm.asked()[0]} " and "--jobs=13 " in slurm.asked()[1]


def test_an_arrays_jobs_are_told_apart_in_one_answer(slurm: Slurm, tmp_path: Path) -> None:
    parent = make(tmp_path, 7)
    rundir.write_json(parent.submitted, {"slurm_job_id": 7, "submitted": 0, "array": 11})
    for index in range(11):
        child = parent.child(str(index)).make()
        rundir.write_json(child.plan, {})
        rundir.write_json(child.submitted, {"slurm_job_id": 7, "array_index": index})
    slurm.say("squeue", "\n".join(f"{'RUNNING' if i == 10 else 'COMPLETED'}|None|N/A|7_{i}" for i in range(11)))
    runs = [parent, *queue.children(parent)]
    assert [run.id.rpartition("/")[2] for run in runs[1:]] == [str(index) for index in range(11)]
    states, _ = queue.states_of(runs)
    assert [state.name for state in states] == ["RUNNING", *["COMPLETED"] * 10, "RUNNING"]
    assert len(slurm.asked()) == 1


def test_silence_leaves_what_is_known(slurm: Slurm, tmp_path: Path) -> None:
    waits, runs, done = (make(tmp_path, job_id) for job_id in (1, 2, 3))
    runs.log(0).touch()
    batch.close_run(done, 0)
    slurm.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    states, silence = queue.states_of([waits, runs, done])
    assert [state.name for state in states] == ["PENDING", "RUNNING", "COMPLETED"]
    assert [state.is_final for state in states] == [False, False, True]
    assert isinstance(silence, ServiceSilent) and len(slurm.asked()) == 1
    assert "as last known" in states[0].reason


def test_no_live_run_asks_nobody(slurm: Slurm, tmp_path: Path) -> None:
    done = make(tmp_path, 1)
    batch.close_run(done, 0)
    assert queue.states_of([done, make(tmp_path, None)])[1] is None
    assert slurm.asked() == []


# ------------------------------------------------------------------ Slurm has forgotten the job


@pytest.mark.parametrize(
    ("ago_s", "end", "state", "says"),
    [
        pytest.param(60, None, "UNKNOWN", "no end marker", id="no marker, time left"),
        pytest.param(LIMIT_S + 600, None, "TIMEOUT", "past its time limit", id="no marker, past the limit"),
        pytest.param(9000, (LIMIT_S - 20, 143, True), "TIMEOUT", "SIGTERM at the time limit", id="at the limit"),
        pytest.param(9000, (60, 143, True), "UNKNOWN", "ended by SIGTERM before", id="a signal long before it"),
        pytest.param(9000, (60, 137, False), "FAILED", "SIGKILL", id="killed"),
    ],
)
def test_a_forgotten_job_is_judged_by_marker_and_clock(
    slurm: Slurm, tmp_path: Path, ago_s: float, end: tuple[float, int, bool] | None, state: str, says: str
) -> None:
    run = make(tmp_path, ago_s=ago_s)
    run.log(0).write_text("it began\n")
    if end:
        lasted_s, code, signalled = end
        rank_ended(run, 0, code, lasted_s=lasted_s)
        if signalled:
            stopped(run)
        batch.close_run(run, code)
    got = queue.state_of(run)
    assert (got.name, got.is_final) == (state, True)
    assert says in got.reason


def test_a_job_that_never_began_did_not_time_out(slurm: Slurm, tmp_path: Path) -> None:
    assert queue.state_of(make(tmp_path, ago_s=LIMIT_S * 10)).name == "UNKNOWN"


def test_a_short_limit_does_not_make_every_signal_a_timeout(slurm: Slurm, run: RunDir) -> None:
    rundir.write_json(run.plan, {"time_s": 60})
    rank_ended(run, 0, 143, lasted_s=5)
    stopped(run)
    batch.close_run(run, 143)
    assert queue.state_of(run).name == "UNKNOWN"


@pytest.mark.parametrize(
    "err", ["slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "squeue: error: odd"]
)
def test_a_silent_controller_is_not_an_end(slurm: Slurm, run: RunDir, err: str) -> None:
    slurm.say("squeue", err=err, code=1)
    with pytest.raises(ServiceSilent):
        queue.state_of(run)


# ------------------------------------------------------------------ waiting, cancelling


def test_waiting_outlasts_a_silent_controller_and_tells_each_change(slurm: Slurm, run: RunDir) -> None:
    slurm.say("squeue", "PENDING|Priority")
    told: list[str] = []

    def tell(state: queue.State) -> None:
        told.append(state.name)
        if state.name == "PENDING":
            slurm.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
            threading.Thread(target=answer_again).start()
        elif state.name == "RUNNING":
            slurm.say("squeue", "OUT_OF_MEMORY|None")

    def answer_again() -> None:
        silent = len(slurm.asked())
        while len(slurm.asked()) < silent + 2:
            time.sleep(0.005)
        slurm.say("squeue", "RUNNING|None")

    assert queue.wait(run, tell, poll_s=0.01).name == "OUT_OF_MEMORY"
    assert told == ["PENDING", "RUNNING", "OUT_OF_MEMORY"]


def test_cancelling_asks_scancel_unless_the_run_has_ended(slurm: Slurm, run: RunDir) -> None:
    slurm.say("squeue", "RUNNING|None")
    assert queue.cancel(run).name == "RUNNING"
    assert slurm.asked()[-1] == "scancel 7"
    slurm.say("squeue", "COMPLETED|None")
    before = len(slurm.asked())
    assert queue.cancel(run).is_final
    assert not any(line.startswith("scancel") for line in slurm.asked()[before:])


def test_a_refused_cancel_is_in_slurms_words(slurm: Slurm, run: RunDir) -> None:
    slurm.say("squeue", "RUNNING|None")
    slurm.say("scancel", err="scancel: error: Kill job error on job id 7: Access/permission denied", code=1)
    with pytest.raises(HpcmlError, match="Access/permission denied"):
        queue.cancel(run)


# ------------------------------------------------------------------ without Slurm; comparisons


def test_a_run_outside_slurm_lives_as_long_as_its_process(slurm: Slurm, tmp_path: Path) -> None:
    run = make(tmp_path, None)
    assert (queue.state_of(run).name, queue.state_of(run).reason) == (
        "UNKNOWN",
        "its process ended without an end marker",
    )
    rundir.claim(run)
    assert queue.state_of(run).name == "RUNNING"
    batch.close_run(run, 0)
    assert queue.state_of(run).name == "COMPLETED"
    assert slurm.asked() == []


def orphaned(root: Path, *codes: int, tasks: int | None = None, **told: str) -> RunDir:
    """A run of this machine whose launcher was killed, with the ranks' markers that are there by now."""
    run = make(root, None)
    rundir.write_json(run.plan, {"name": "a", "nodes": 1, "tasks_per_node": len(codes) if tasks is None else tasks})
    with subprocess.Popen(["sleep", "60"]) as launcher:
        rundir.claim(run, launcher.pid)
        launcher.kill()
    for rank, code in enumerate(codes):
        rank_ended(run, rank, code, reason=told.get(f"rank{rank}", ""))
    return run


@pytest.mark.parametrize(
    ("codes", "stop", "state", "exit_code", "says"),
    [
        pytest.param([0, 0], "", "COMPLETED", 0, "", id="it had only the marker left to write"),
        pytest.param([3, 0], "", "FAILED", 3, "ValueError: no; its launcher was killed too", id="a rank had failed"),
        pytest.param(
            [143, 143], "SIGTERM", "CANCELLED", 143, "its launcher was killed, which ended", id="ended with it"
        ),
        pytest.param(
            [0, 0], "SIGTERM", "CANCELLED", 143, "its launcher was killed, which ended", id="ended well on TERM"
        ),
        pytest.param([75, 75], "SIGTERM", "CANCELLED", 75, "killed; ValueError: no", id="saved, and stopped"),
        pytest.param([75, 75], "SIGUSR2", "CANCELLED", 75, "ValueError: no", id="asked to stop before"),
        pytest.param([0, 0], "SIGUSR2", "COMPLETED", 0, "", id="USR2 is a warning only"),
    ],
)
def test_ranks_tell_how_a_run_ended_whose_launcher_was_killed(
    tmp_path: Path, codes: list[int], stop: str, state: str, exit_code: int, says: str
) -> None:
    run = orphaned(tmp_path, *codes, rank0="ValueError: no")
    if stop:
        stopped(run, stop)
    got = queue.state_of(run)
    assert (got.name, got.exit_code, got.is_final) == (state, exit_code, True)
    assert says in got.reason and got.replicas_in_sync == 2 and got.started and got.ended
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["final"]) == (state, True), "delivery and report read it"
    assert queue.state_of(run) == got


def test_the_rank_that_died_first_gives_the_reason(tmp_path: Path) -> None:
    run = orphaned(tmp_path, 1, 5, rank0="the consequence", rank1="the cause")
    rank_ended(run, 0, 1, reason="the consequence")
    got = queue.state_of(run)
    assert (got.name, got.exit_code) == ("FAILED", 5) and got.reason.startswith("the cause")


def test_a_rank_without_a_marker_leaves_the_end_unknown(tmp_path: Path) -> None:
    run = orphaned(tmp_path, 143, tasks=3, rank0="killed by SIGTERM")
    stopped(run)
    assert (queue.state_of(run).name, queue.state_of(run).is_final) == ("COMPLETING", False), "they may be saving"
    stopped(run, ago_s=60)
    got = queue.state_of(run)
    assert (got.name, got.is_final) == ("UNKNOWN", True) and not run.status.exists()
    assert "launcher was killed, and ranks 1, 2 left no end marker; rank 0: killed by SIGTERM" in got.reason


def test_markers_of_an_earlier_launcher_say_nothing(tmp_path: Path) -> None:
    run = orphaned(tmp_path, 3, rank0="the first time")
    os.utime(run.status_of(0), (1, 1))
    assert queue.state_of(run).name == "UNKNOWN"
    rank_ended(run, 0, 0, restart=1)
    assert queue.state_of(run).name == "COMPLETED" and rundir.read_json(run.status)["restarts"] == 1


def test_a_variant_that_waits_its_turn_here_is_pending(slurm: Slurm, tmp_path: Path) -> None:
    parent = make(tmp_path, None)
    rundir.claim(parent)
    child = parent.child("two").make()
    rundir.write_json(child.plan, {})
    assert queue.state_of(child).name == "PENDING"
    rundir.claim(child)
    assert queue.state_of(child).name == "RUNNING"


def test_variants_of_a_queued_comparison(slurm: Slurm, run: RunDir) -> None:
    first, second, third = (run.child(name).make() for name in ("one", "two", "three"))
    slurm.say("squeue", "PENDING|Priority")
    assert queue.state_of(third).name == "PENDING"
    slurm.say("squeue", "RUNNING|None")
    rank_ended(first, 0, 1, reason="no")
    batch.close_run(first, 1)
    second.log(0).write_text("begun\n")
    states = [queue.state_of(child) for child in (first, second, third)]
    assert [state.name for state in states] == ["FAILED", "RUNNING", "PENDING"]
    assert {state.slurm_job_id for state in states} == {7}
    slurm.say("squeue", "TIMEOUT|TimeLimit")
    assert [queue.state_of(child).name for child in (first, second, third)] == ["FAILED", "TIMEOUT", "TIMEOUT"]


# ------------------------------------------------------------------ logs and progress


def test_progress_in_words(run: RunDir) -> None:
    assert queue.progress(run) == ""
    journal = Journal(run.event_file(0, 0, "engine"))
    journal.write("progress", done=3, total=9, unit="cell", text="")
    journal.write("progress", done=4, total=9, unit="cell", text="")
    Journal(run.event_file(1, 0, "engine")).write("progress", done=9, total=9, unit="cell", text="")
    Journal(run.event_file(0, 0, "rank")).write("progress", done=2, total=5, unit="epoch", text="epoch 2/5 acc 0.9")
    assert queue.progress(run) == "cell 5/9 · epoch 2/5 acc 0.9"  # four are done, the fifth runs


def test_logs_in_order_and_only_a_runs_own(run: RunDir) -> None:
    for rank in (10, 2, 0):
        run.log(rank).touch()
    (run.logs / "slurm-7.out").touch()
    child = run.child("v").make()
    rundir.write_json(child.plan, {})
    child.log(0).touch()
    (run.code / "logs").mkdir(parents=True)
    (run.code / "logs" / "out.0.txt").touch()
    names = [str(path.relative_to(run.path)) for path in queue.log_paths(run)]
    assert names == ["logs/slurm-7.out", "logs/out.0.txt", "logs/out.2.txt", "logs/out.10.txt", "v/logs/out.0.txt"]


def test_variants_are_in_the_comparisons_order(run: RunDir) -> None:
    names = ["two", "ten", "one"]
    rundir.write_json(run.plan, {"work": "comparison", "target": names})
    for name in names:
        child = run.child(name).make()
        rundir.write_json(child.plan, {})
        child.log(0).touch()
    assert [child.id.rpartition("/")[2] for child in queue.children(run)] == names
    assert [path.parent.parent.name for path in queue.log_paths(run)] == names


def test_progress_reads_only_what_is_new(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(run.event_file(0, 0, "rank"))
    for step in range(20_000):
        journal.metric(step, {"loss": 0.5})
        if step == 100:
            journal.write("progress", done=1, total=5, unit="epoch", text="epoch 1/5")
    assert queue.progress(run) == "epoch 1/5"
    read = 0
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read
        read += length
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert queue.progress(run) == "epoch 1/5" and read == 0
    journal.write("progress", done=2, total=5, unit="epoch", text="epoch 2/5")
    assert queue.progress(run) == "epoch 2/5" and 0 < read < 1000


@pytest.mark.parametrize("padding", [0, 1, 1000, *range(130_960, 131_060, 10), 262_144, 600_000])
def test_progress_is_found_wherever_blocks_end(run: RunDir, padding: int) -> None:
    path = run.event_file(0, 0, "rank")
    record = '{"t":1,"kind":"progress","done":2,"total":5,"unit":"epoch","text":"epoch 2/5"}\n'
    other = '{"t":1,"kind":"message","level":"info","text":"' + "x" * padding + '"}\n'
    path.write_text(other + record + other * 2 + '{"t":1,"kind":"progress","done":3,"to')
    assert queue.progress(run) == "epoch 2/5", "the torn line at the end is no record"
    with path.open("a") as file:
        file.write('tal":5,"unit":"epoch","text":"epoch 3/5"}\n')
    assert queue.progress(run) == "epoch 3/5"


def test_progress_is_of_the_newest_restart(run: RunDir) -> None:
    for restart, done in ((0, 4), (2, 3), (10, 1)):
        text = f"epoch {done}/5"
        Journal(run.event_file(0, restart, "rank")).write("progress", done=done, total=5, unit="epoch", text=text)
    assert queue.progress(run) == "epoch 1/5"


# ------------------------------------------------------------------ following logs


def test_following_yields_whole_lines_and_the_last_half_at_the_end(run: RunDir) -> None:
    def steps() -> Iterator[bool]:
        run.log(0).write_bytes(b"one\ntw")
        yield False
        with run.log(0).open("ab") as file:
            file.write(b"o\n")
        run.log(1).write_bytes("ñ \xff".encode("latin-1"))
        yield False
        yield True

    script = steps()
    got = [(path.name, line) for path, line in queue.follow(run, lambda: next(script), poll_s=0)]
    assert got == [("out.0.txt", "one"), ("out.0.txt", "two"), ("out.1.txt", "\ufffd \ufffd")]


def new(follower: queue.Follower, *, whole: bool = False) -> list[str]:
    return [f"{path.name.split('.')[1]} {line}" for path, line in follower.new(whole=whole)]


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def test_a_progress_bar_comes_as_its_last_state(run: RunDir) -> None:
    follower = queue.Follower(run)
    append(run.log(0), b"".join(b"\r%d%%|####" % done for done in range(50)))
    assert new(follower) == []
    append(run.log(0), b"\r99%|####\r100%|####\nnext\r\n")
    assert new(follower) == ["0 100%|####", "0 next"]
    append(run.log(0), b"10%\r20%\r")
    assert new(follower) == []
    assert new(follower, whole=True) == ["0 20%"]
    assert list(queue.lines_of(run.log(0))) == ["100%|####", "next", "20%"]


def test_a_character_that_is_written_in_two_pieces(run: RunDir) -> None:
    follower, text = queue.Follower(run), "火\n".encode()
    for byte in (text[i : i + 1] for i in range(len(text))):
        assert new(follower) == []
        append(run.log(0), byte)
    assert new(follower) == ["0 火"]


def test_ranks_that_appear_later_and_logs_that_are_replaced(run: RunDir) -> None:
    follower = queue.Follower(run)
    append(run.log(0), b"first\nhalf")
    assert new(follower) == ["0 first"]
    run.log(0).unlink()
    append(run.log(0), b"a new file that is longer than the old one\n")
    append(run.log(10), b"ten\n")
    append(run.log(2), b"two\n")
    assert new(follower) == ["0 half", "0 a new file that is longer than the old one", "2 two", "10 ten"]
    run.log(2).write_bytes(b"cut\non\n")  # the same file again, longer; then one that is shorter
    os.truncate(run.log(10), 0)
    assert new(follower) == ["2 cut", "2 on"]
    append(run.log(10), b"x\n")
    assert new(follower) == ["10 x"]
    assert new(follower) == [] == new(follower, whole=True)


def test_a_log_that_vanishes_or_cant_be_read_ends_nothing(run: RunDir) -> None:
    run.log(0).mkdir()
    append(run.log(1), b"one\n")
    assert new(queue.Follower(run)) == ["1 one"]
    assert list(queue.lines_of(run.log(5))) == []


def test_following_while_real_processes_write(run: RunDir) -> None:
    """Every line of three writers arrives whole and in order, whatever the pieces."""
    count = 400

    def write(rank: int) -> None:
        with run.log(rank).open("ab", buffering=0) as file:
            for number in range(count):
                line = f"{rank}:{number}:{'x' * (number % 90)}\n".encode()
                cut = (number * 7) % len(line)
                file.write(line[:cut])
                file.write(line[cut:])

    writers = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for writer in writers:
        writer.start()
    got: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for _, line in queue.follow(run, lambda: not any(w.is_alive() for w in writers), poll_s=0.001):
        got[int(line.split(":")[0])].append(line)
    for rank, lines in got.items():
        assert lines == [f"{rank}:{number}:{'x' * (number % 90)}" for number in range(count)]


@pytest.mark.parametrize(
    ("state", "since"),
    [("PENDING", 10.0), ("REQUEUED", 10.0), ("RUNNING", 50.0), ("COMPLETING", 50.0), ("COMPLETED", 50.0)],
)
def test_a_waiting_run_counts_from_its_submission_and_others_from_their_start(state: str, since: float) -> None:
    assert queue.State("a", state, submitted=10.0, started=50.0).since == since
    assert queue.State("a", "RUNNING", submitted=10.0).since is None
