"""A rank dies at the worst of moments, or waits for ever, on a real Slurm of two nodes: the job ends and says why."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from calls import HPCML, call, logs, until
from conftest import Cluster

from hpcml import rundir
from hpcml.rundir import RunDir

# What a job may take to end after one of its ranks has died.
END_S = 30
STEPS = 20
# One epoch of a few steps; `now(…)` is where something happens to a rank.
TRAIN = f"""
import os, signal, time
from hpcml.node import batch

rank, run_path = int(os.environ["SLURM_PROCID"]), batch.current_run().path

def now(place):
    (run_path / f"{{place}}.{{rank}}").touch()
    {{happens}}

now("start")
import hpcml
run = hpcml.begin(strategy="ddp")
import torch
torch.distributed.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
now("begun")
batches = list(torch.arange({STEPS} * 4.0).reshape({STEPS}, 1, 4) / 100)
for epoch in run.epochs(1, model, global_batch=2, keep=[optimizer]):
    for step, x in enumerate(run.steps(batches), 1):
        now(f"step{{step}}")
        loss = model(x).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
now("trained")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
KILLED = 'if (place, rank) == ("{place}", 1): os.kill(os.getpid(), signal.SIGKILL)'
HELD = 'if place == "{place}": time.sleep(600)'
JOB = """
script = "train.py"
name = "faults"
strategy = "ddp"
stall_timeout = "{stall}"
[resources]
nodes = 2
cpus_per_task = 1
[env]
vars = {{MLFLOW_TRACKING_URI = "http://127.0.0.1:9"}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    return folder


def submitted(cluster: Cluster, project: Path, happens: str, stall: str = "off") -> RunDir:
    (project / "train.py").write_text(TRAIN.replace("{happens}", happens))
    (project / "job.toml").write_text(JOB.format(stall=stall))
    done = call(cluster, project, *HPCML, "submit", "job.toml", "--json")
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["path"])
    return RunDir(path.parent, path.name)


def ended(cluster: Cluster, project: Path, run: RunDir, limit_s: float) -> dict[str, Any]:
    """Wait for the state that a person is told, and return it with the marker."""
    told: dict[str, Any] = {}

    def over() -> bool:
        told.update(json.loads(call(cluster, project, *HPCML, "status", run.id, "--json").stdout))
        return told["name"] not in ("PENDING", "RUNNING", "COMPLETING")

    until(over, f"the run ends: {logs(run.path)}", limit_s)
    return {**rundir.read_json(run.status), "state": told["name"]}


@pytest.mark.parametrize("place", ["start", "begun", "step1", f"step{STEPS}", "trained"])
def test_a_rank_killed_at_any_time_ends_the_job_and_is_named(cluster2: Cluster, project: Path, place: str) -> None:
    run = submitted(cluster2, project, KILLED.format(place=place))
    until(lambda: (run.path / f"{place}.1").exists(), f"rank 1 is at {place}")
    died = time.monotonic()
    end = ended(cluster2, project, run, END_S)
    print(f"{place}: the job ended {time.monotonic() - died:.1f} s later: {end['reason']}")
    assert (end["state"], end["failed_rank"]) == ("FAILED", 1), (end, logs(run.path))
    assert "SIGKILL" in end["reason"], (end, logs(run.path))


@pytest.mark.parametrize("place", ["start", "begun"])
def test_cancelled_while_it_starts(cluster2: Cluster, project: Path, place: str) -> None:
    run = submitted(cluster2, project, HELD.format(place=place))
    until(lambda: all((run.path / f"{place}.{rank}").exists() for rank in (0, 1)), f"both ranks are at {place}")
    assert call(cluster2, project, *HPCML, "cancel", run.id).returncode == 0
    assert ended(cluster2, project, run, END_S)["state"] == "CANCELLED"


def test_asked_to_stop_while_it_starts_it_stops_at_its_first_step(cluster2: Cluster, project: Path) -> None:
    """USR2 comes before anything of hpcml or torch is imported: it ends nobody, and is not forgotten."""
    waits = 'while place == "start" and not (run_path / "stop").exists(): time.sleep(0.05)'
    run = submitted(cluster2, project, waits)
    until(lambda: all((run.path / f"start.{rank}").exists() for rank in (0, 1)), "both ranks start")
    cluster2.run("scancel", "--signal=USR2", str(rundir.slurm_job_id(run)))
    end = ended(cluster2, project, run, 120)
    assert (end["state"], end["exit_code"]) == ("CANCELLED", 75), (end, logs(run.path))
    assert "stopped by SIGUSR2 after step 1; a checkpoint is kept" in end["reason"]
    assert rundir.kept_at(run) == (0, 1)


def test_a_collective_that_stalls_ends_the_job_with_the_stacks_of_all_ranks(cluster2: Cluster, project: Path) -> None:
    run = submitted(cluster2, project, 'if (place, rank) == ("step9", 1): time.sleep(600)', stall="00:00:05")
    until(lambda: (run.path / "step9.1").exists(), "rank 1 goes elsewhere")
    stalled = time.monotonic()
    end = ended(cluster2, project, run, 60)
    print(f"the job ended {time.monotonic() - stalled:.1f} s after its last step: {end['reason']}")
    assert (end["state"], end["exit_code"]) == ("FAILED", 1), (end, logs(run.path))
    assert end["reason"].startswith("no step for 5 s after step 8: rank 0 is at train.py line "), end["reason"]
    assert ", rank 1 is at train.py line 9 in now; stacks of all ranks are in their logs" in end["reason"]
    assert "in _engine_run_backward" in run.log(0).read_text() and ", line 9 in now" in run.log(1).read_text()
    report = call(cluster2, project, *HPCML, "status", run.id)
    assert "no step for 5 s after step 8" in report.stdout
