"""Which of several ranks that failed is named, by what each of them left behind."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import rundir
from hpcml.node import batch, bootstrap, devices, ending, threads, topology
from hpcml.node import beside as beside_the_work
from hpcml.rundir import RunDir

GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:5110"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Three tasks."""
    made = RunDir(tmp_path, "20260101-000000-a").make()
    made.plan.write_text(json.dumps({"work": "script", "target": ["a.py"], "nodes": 3, "tasks_per_node": 1}))
    return made


def rank(number: int, code: int, ended: float, reason: str = "") -> dict[str, Any]:
    return {"rank": number, "exit_code": code, "ended": ended, "reason": reason, "restart": 0, "started": 0.0}


@pytest.mark.parametrize(
    ("ranks", "srun", "cleared", "named"),
    [
        pytest.param([rank(0, 1, 5.0), rank(1, 3, 4.0), rank(2, 143, 7.0)], 3, 6.0, 1, id="the first in time"),
        pytest.param([rank(0, 1, 4.0, GONE), rank(1, 137, 5.0)], 137, None, 1, id="not who lost its peer"),
        pytest.param([rank(0, 1, 4.0, GONE), rank(1, 143, 7.0)], 1, 6.0, 0, id="nor who was cleared away"),
        pytest.param([rank(0, 1, 4.0, GONE), rank(2, 143, 7.0)], 137, 6.0, 1, id="a worker was killed"),
        pytest.param(
            [rank(0, 143, 7.0), rank(1, 143, 7.0)], 137, 6.0, 2, id="a worker was killed, nobody else noticed"
        ),
        pytest.param(
            [rank(0, 1, 4.0, "ValueError: no"), rank(1, 143, 7.0)], 137, 6.0, 0, id="a deaf one was killed last"
        ),
        pytest.param([rank(0, 1, 4.0, GONE)], 1, None, 0, id="nobody was killed"),
        pytest.param([rank(0, 0, 4.0), rank(1, 0, 4.0), rank(2, 0, 5.0)], 0, None, None, id="all is well"),
    ],
)
def test_the_cause_is_named(
    run: RunDir, ranks: list[dict[str, Any]], srun: int, cleared: float | None, named: int | None
) -> None:
    for one in ranks:
        run.status_of(one["rank"]).write_text(json.dumps(one))
    if cleared is not None:
        run.stop.write_text(json.dumps({"signal": "SIGTERM", "time": cleared, "restart": 0}))
    marker = batch.close_run(run, srun)
    assert marker["failed_rank"] == named
    assert marker["signal"] is None, "the ranks ended by themselves first"


def test_a_run_has_ended_when_the_work_of_its_last_rank_has(run: RunDir) -> None:
    """Delivery comes after; and of a rank that left nothing nobody knows until when it worked."""
    for number in range(2):
        run.status_of(number).write_text(json.dumps(rank(number, 0, 4.0 + number)))
    assert batch.close_run(run, 0)["ended"] > 1e9
    run.status_of(2).write_text(json.dumps(rank(2, 0, 4.5)))
    assert batch.close_run(run, 0)["ended"] == 5.0


def test_a_run_whose_ranks_left_nothing_is_slurms_to_judge(run: RunDir) -> None:
    """srun ends with 0 where Slurm takes the job of a lost node back into the queue."""
    assert batch.close_run(run, 0)["final"] is False
    for number in range(3):
        run.status_of(number).write_text(json.dumps(rank(number, 0, 4.0)))
    marker = batch.close_run(run, 0)
    assert (marker["state"], marker["final"]) == ("COMPLETED", True)


def test_an_execution_that_was_given_up_leaves_no_marker(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a node failure it may still be alive when the second one runs."""
    for name, value in {"HPCML_RUNS": str(run.root), "HPCML_RUN": run.id, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["batch", "close", "1"])
    run.event_file(0, 2, "rank").touch()
    assert ending.superseded(run, 1) and not ending.superseded(run, 2)
    assert batch.main() == 0 and not run.status.exists()
    assert "goes on in a later execution" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert batch.main() == 0 and rundir.read_json(run.status)["restarts"] == 2


def test_what_term_killed_before_the_time_was_noted_was_cleared_away(run: RunDir) -> None:
    run.status_of(0).write_text(json.dumps(rank(0, 143, 5.99, "killed by SIGTERM")))
    run.stop.write_text(json.dumps({"signal": "SIGTERM", "time": 6.0, "restart": 0}))
    marker = batch.close_run(run, 143)
    assert (marker["signal"], marker["final"]) == ("SIGTERM", False), "Slurm knows whether it was the time limit"


@pytest.mark.parametrize("code", [137, 143])
def test_a_cancelled_job_names_no_rank_that_left_nothing(run: RunDir, code: int) -> None:
    """KILL follows TERM after KillWait: a rank that was slow to end has left no marker."""
    run.status_of(0).write_text(json.dumps(rank(0, 143, 7.0, "killed by SIGTERM")))
    run.stop.write_text(json.dumps({"signal": "SIGTERM", "time": 6.0, "restart": 0}))
    marker = batch.close_run(run, code, "TERM")
    assert (marker["failed_rank"], marker["signal"], marker["final"]) == (0, "TERM", False)


@pytest.mark.parametrize(
    "said",
    [
        GONE,
        "Read error [10.0.0.2]:5110: Connection reset by peer",
        "DistBackendError: NCCL error: remote process exited or there was a network error, NCCL version 2.27",
        "UnavailableError: Collective ops is aborted by: failed to connect to all addresses",
        "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
    ],
)
def test_what_a_rank_says_that_lost_its_peer(said: str) -> None:
    assert ending.lost_its_peer(said)
    assert not ending.lost_its_peer("ValueError: the batch is empty")


def test_the_last_words_are_a_signal_an_exception_or_a_line(tmp_path: Path) -> None:
    log = tmp_path / "out.0.txt"
    log.write_text("epoch 1\nTraceback (most recent call last):\nlib.errors.BadError: no\nbye\n")
    assert ending.last_words(log, 1) == "BadError: no"
    assert ending.last_words(log, 128 + signal.SIGKILL).startswith("killed by SIGKILL")
    log.write_text("[rank1]: Traceback (most recent call last):\n[rank1]: torch.distributed.DistError: no\nbye\n")
    assert ending.last_words(log, 1) == "DistError: no", "torch puts the rank before each line"
    log.write_text(f"terminate called after throwing an instance of 'std::runtime_error'\n  what(): {GONE}\nframe 0\n")
    assert ending.lost_its_peer(ending.last_words(log, 128 + signal.SIGABRT)), "it is not the first of the dead"
    log.write_text("hpcml: rank 0 of 1\nbye\n")
    assert ending.last_words(log, 3) == "exit code 3; its last line: bye"


LOCAL = {"HPCML_RANK": "0"}


@pytest.mark.parametrize(
    ("hurried", "environment", "brief"),
    [
        pytest.param(False, {}, False, id="the last one who delivers"),
        pytest.param(True, {}, True, id="while a failed rank's worker lives, srun clears nobody away"),
        pytest.param(False, LOCAL, True, id="hpcml run delivers the rest"),
        pytest.param(False, LOCAL | {"SUBMITIT_LOCAL_GLOBALID": "0"}, False, id="a function's caller doesn't"),
    ],
)
def test_others_do_not_wait_for_a_delivery(
    run: RunDir, hurried: bool, environment: dict[str, str], brief: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(beside_the_work.follow, "in_job", lambda run: None)
    monkeypatch.setattr(beside_the_work.follow, "finish", lambda child, limit_s: waited.append(limit_s))
    monkeypatch.setattr(beside_the_work, "watch", lambda *_: None)
    ready = bootstrap.Bootstrap(topology.Topology(), devices.Devices(), threads.Threads(1, "", {}, {}), {})
    with beside_the_work.beside(run, ready, environment, 0) as hurry:
        if hurried:
            hurry.set()
    assert (waited[0] < 10) is brief
