"""Which runs go on: put back into the queue by their own job, or resumed by a person."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpcml import rundir
from hpcml.errors import HpcmlError
from hpcml.launch import resume as launch_resume
from hpcml.node import batch
from hpcml.rundir import RunDir
from hpcml.slurm import commands
from hpcml.slurm.text import JobState


def a_run(folder: Path, *, kept: int | None = 0, requeues: int = 1, state: str = "CANCELLED", **plan: Any) -> RunDir:
    """A run that has ended, with a checkpoint that its restart ``kept`` saved."""
    run = RunDir(folder / "runs", "20260101-000000-train").make()
    told = {"name": "train", "work": "script", "nodes": 1, "tasks_per_node": 1, "slurm": {"max_requeues": requeues}}
    rundir.write_json(run.plan, told | plan)
    rundir.write_json(run.status, {"state": state, "final": True, "exit_code": 75, "restarts": 0})
    if kept is not None:
        place = run.checkpoints / "step-00000040"
        place.mkdir(parents=True)
        rundir.write_json(place / "checkpoint.json", {"place": {"step": 40}, "restart": kept})
    return run


def marker(code: int, signal: str | None, restarts: int = 0) -> dict[str, Any]:
    return {"exit_code": code, "signal": signal, "restarts": restarts}


@pytest.mark.parametrize(
    ("code", "signal", "again"),
    [
        (75, "SIGUSR2", True),  # before the time limit it saved and stopped
        (75, "USR2", True),
        (137, "SIGUSR2", True),  # it came to no step to save at, and was ended at its last checkpoint
        (137, None, True),  # a rank was killed
        (1, None, False),  # it would fail again
        (1, "SIGUSR2", False),
        (0, "SIGUSR2", False),
        (137, "SIGTERM", False),
        (143, "SIGTERM", False),
    ],
)
def test_what_is_put_back_into_the_queue(tmp_path: Path, code: int, signal: str | None, again: bool) -> None:
    assert batch.goes_on(a_run(tmp_path), marker(code, signal)) is again


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("CANCELLED", False), ("TIMEOUT", False)])
def test_after_a_term_only_a_job_that_slurm_did_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(commands, "job_state", lambda job: JobState(state))
    run = a_run(tmp_path, requeues=0)  # a preempted job is requeued by Slurm however often
    assert batch.goes_on(run, marker(75, "SIGTERM")) is again


def test_without_progress_or_too_often_it_ends(tmp_path: Path) -> None:
    assert not batch.goes_on(a_run(tmp_path / "a", kept=None), marker(137, None))
    assert not batch.goes_on(a_run(tmp_path / "b", kept=0, requeues=5), marker(137, None, restarts=1))
    assert batch.goes_on(a_run(tmp_path / "c", kept=1, requeues=2), marker(137, None, restarts=1))
    assert not batch.goes_on(a_run(tmp_path / "d", kept=2, requeues=2), marker(137, None, restarts=2))
    assert not batch.goes_on(a_run(tmp_path / "e", requeues=0), marker(137, None))
    assert not batch.goes_on(a_run(tmp_path / "f", work="function"), marker(137, None))


@pytest.mark.parametrize(
    ("after_s", "requeues", "state"),
    [(1680, 2, "TIMEOUT"), (1620, 2, "TIMEOUT"), (60, 2, "CANCELLED"), (1680, 0, "CANCELLED"), (1680, 3, "CANCELLED")],
)
def test_a_run_whose_requeues_are_used_up_says_so(tmp_path: Path, after_s: int, requeues: int, state: str) -> None:
    run = a_run(tmp_path, requeues=requeues, time_s=1800)
    rundir.write_json(run.stop, {"signal": "SIGUSR2", "time": 1000.0 + after_s, "restart": 2})
    told = marker(75, "SIGUSR2", restarts=2) | {
        "state": "CANCELLED",
        "started": 1000.0,
        "reason": "stopped after step 75",
    }
    rundir.write_json(run.status, told)
    ended = batch.out_of_time(run, told)
    assert ended["state"] == state == rundir.read_json(run.status)["state"]
    assert ("requeues that it may have (max_requeues) are used up" in ended["reason"]) == (state == "TIMEOUT")


def test_two_resume_a_run_at_once_and_one_of_them_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCML_RESUMED", "0")  # put back at the end
    run = a_run(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    began = threading.Barrier(2)

    def once(_: int) -> str:
        began.wait()
        try:
            launch_resume.begin(run, None)  # type: ignore[arg-type]
        except HpcmlError as error:
            return str(error)
        return "goes on"

    with ThreadPoolExecutor(2) as pool:
        told = sorted(pool.map(once, range(2)))
    assert told[0] == "goes on" and "has not ended: it is RUNNING" in told[1]


def resume(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hpcml", "resume", *words, "--site", "local"]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("made", "why", "fix"),
    [
        ({"kept": None}, "kept no checkpoint", "keep=[optimizer]"),
        ({"state": "COMPLETED"}, "has completed", "starts it anew"),
        ({"work": "function"}, "can't be resumed", "starts it anew"),
        ({"work": "comparison"}, "can't be resumed", "hpcml compare"),
    ],
)
def test_what_cannot_be_resumed_is_said_and_left_alone(
    tmp_path: Path, made: dict[str, Any], why: str, fix: str
) -> None:
    (tmp_path / "pyproject.toml").touch()
    run = a_run(tmp_path, **made)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = resume(tmp_path, run.id)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert why in done.stderr and fix in done.stderr
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_that_goes_on_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    run = a_run(tmp_path)
    run.status.unlink()
    rundir.claim(run)  # this process
    done = resume(tmp_path, run.id)
    assert done.returncode == 2 and "has not ended: it is RUNNING" in done.stderr


def test_the_newest_checkpoint_says_which_restart_came_how_far(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for step, restart in ((60, 1), (100, 2)):
        (run.checkpoints / f"step-{step:08d}").mkdir()
        told = {"place": {"step": step}, "restart": restart}
        (run.checkpoints / f"step-{step:08d}" / "checkpoint.json").write_text(json.dumps(told))
    assert rundir.kept_at(run) == (2, 100)
