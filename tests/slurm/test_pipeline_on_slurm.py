"""Chains as dependent jobs of a real Slurm: done, failed, cancelled, one step alone, gone on with, and a model registered."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from calls import HPCML, call, until

from hpcml import queue, rundir
from hpcml.rundir import RunDir

if TYPE_CHECKING:
    from conftest import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
# A step holds while a file of the test's is there, and fails while another is.
WORK = """
import json, os, sys, time
from pathlib import Path

name, folder = sys.argv[1], Path("{folder}")
(folder / f"begun.{{name}}").touch()
while (folder / f"hold.{{name}}").exists():
    time.sleep(0.05)
if (folder / f"fail.{{name}}").exists():
    sys.exit(f"{{name}} had no luck")
print(name, "knows", *json.loads(os.environ["HPCML_STEPS"]), flush=True)
"""
STEP = '[[steps]]\nname = "{name}"\ncommand = ["{python}", "work.py", "{name}"]\n{more}'
NAMES = ("prepare", "train", "evaluate")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a chain of three steps."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (folder / "work.py").write_text(WORK.format(folder=tmp_path))
    text = '[resources]\ntime = "00:05:00"\n' + "".join(
        STEP.format(name=n, python=sys.executable, more="") for n in NAMES
    )
    (folder / "jobs" / "c.toml").write_text(text)
    return folder


def newest(project: Path) -> RunDir:
    return next(run for run in rundir.every(project / "runs") if "/" not in run.id)


def told(cluster: Cluster, project: Path, run: RunDir) -> dict[str, tuple[str, str]]:
    """State and reason of the chain, as "", and of its steps, as ``hpcml status --json`` tells them."""
    done = call(cluster, project, *HPCML, "status", run.id, "--json")
    state = json.loads(done.stdout)
    return {one["run_id"].partition("/")[2]: (one["name"], one["reason"]) for one in (state, *state["steps"])}


def jobs(cluster: Cluster) -> str:
    return cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%j %T %E").stdout


@pytest.fixture(params=["cluster", "cluster_accounting"])
def either(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Without accounting, and with it."""
    yield request.getfixturevalue(request.param)


def test_each_step_is_a_job_that_waits_for_the_one_before(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    (tmp_path / "hold.prepare").touch()
    done = call(cluster, project, *HPCML, "submit", "jobs/c.toml", "--json")
    assert done.returncode == 0, done.stderr
    ids = json.loads(done.stdout)["slurm_job_ids"]
    assert list(ids) == [*NAMES]
    until((tmp_path / "begun.prepare").exists, "the first step begins")
    assert f"afterok:{ids['prepare']}" in jobs(cluster) and f"afterok:{ids['train']}" in jobs(cluster)
    run = newest(project)
    seen = told(cluster, project, run)
    assert seen[""][0] == seen["prepare"][0] == "RUNNING" and seen["evaluate"] == ("PENDING", "waits for train")
    (tmp_path / "hold.prepare").unlink()
    until(lambda: rundir.read_json(run.child("evaluate").status).get("final") is True, "the last step ends")
    assert told(cluster, project, run) == dict.fromkeys(["", *NAMES], ("COMPLETED", ""))
    ends = [rundir.read_json(run.child(name).status) for name in NAMES]
    assert all(before["ended"] <= after["started"] for before, after in itertools.pairwise(ends))
    assert "evaluate knows prepare train" in run.child("evaluate").log(0).read_text()


def test_a_step_that_fails_stops_the_chain_and_says_why(either: Cluster, project: Path, tmp_path: Path) -> None:
    (tmp_path / "fail.train").touch()
    done = call(either, project, *HPCML, "submit", "jobs/c.toml", "--wait")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"FAILED \S+-c .*\n +reason +step train: .*train had no luck", done.stdout)
    assert re.search(r"evaluate +CANCELLED +job \d+ · never started: train is FAILED", done.stdout)
    assert "train: FAILED" in done.stderr and "| train had no luck" in done.stderr
    until(lambda: not jobs(either), "Slurm takes the last job out of the queue")
    run = newest(project)
    assert not (tmp_path / "begun.evaluate").exists()
    assert told(either, project, run)["evaluate"] == ("CANCELLED", "never started: train is FAILED")

    (tmp_path / "fail.train").unlink()
    before = run.child("prepare").status.read_bytes()
    done = call(either, project, *HPCML, "resume", run.id, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(either, project, run) == dict.fromkeys(["", *NAMES], ("COMPLETED", ""))
    assert run.child("prepare").status.read_bytes() == before


def test_a_step_alone_and_all_from_one_on(cluster: Cluster, project: Path) -> None:
    done = call(cluster, project, *HPCML, "submit", "jobs/c.toml", "--step", "prepare", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    first = newest(project)
    assert [child.id for child in queue.children(first)] == [f"{first.id}/prepare"]
    done = call(cluster, project, *HPCML, "submit", "jobs/c.toml", "--from", "train", "--wait")
    assert done.returncode == 0 and f"prepare is that of {first.id}" in done.stdout, done.stdout + done.stderr
    run = newest(project)
    assert [child.id.rpartition("/")[2] for child in queue.children(run)] == ["train", "evaluate"]
    handed = rundir.read_json(run.child("evaluate").plan)["env"]["vars"]["HPCML_STEPS"]
    assert json.loads(handed) == {"prepare": str(first.child("prepare").path), "train": str(run.child("train").path)}


def test_cancelling_the_chain_cancels_all_of_it(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    with (project / "jobs" / "c.toml").open("a") as file:
        file.write('[[steps]]\nname = "report"\naction = "report"\n')
    (tmp_path / "hold.train").touch()
    assert call(cluster, project, *HPCML, "submit", "jobs/c.toml").returncode == 0
    until((tmp_path / "begun.train").exists, "the second step begins")
    run = newest(project)
    done = call(cluster, project, *HPCML, "cancel", run.id)
    assert done.returncode == 0, done.stderr
    until(lambda: not jobs(cluster), "the jobs are gone")
    until(lambda: told(cluster, project, run)[""][0] == "CANCELLED", "the chain has ended", 60)
    seen = told(cluster, project, run)
    assert {name: state for name, (state, _) in seen.items()} == {
        "": "CANCELLED", "prepare": "COMPLETED", "train": "CANCELLED", "evaluate": "CANCELLED", "report": "CANCELLED",
    }  # fmt: skip
    assert not (tmp_path / "begun.evaluate").exists()


def test_a_refused_step_leaves_nothing_behind(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    (tmp_path / "hold.prepare").touch()
    done = call(cluster, project, *HPCML, "submit", "jobs/c.toml", "--set", "evaluate.slurm.account=nobody-knows",
                "--set", 'evaluate.slurm.extra=["--begin=yesteryear"]')  # fmt: skip
    assert done.returncode == 2 and "sbatch refused" in done.stderr, done.stdout + done.stderr
    (tmp_path / "hold.prepare").unlink()
    until(lambda: not jobs(cluster), "the jobs that were queued are gone")
    assert [path for path in (project / "runs").iterdir() if path.is_dir()] == []


# ------------------------------------------------------------------ the lifecycle


@pytest.fixture
def lifecycle(tmp_path: Path) -> Path:
    """A project with the repository's retraining and its digits."""
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    pytest.importorskip("tensorflow", reason="needs the extra `tensorflow`")
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    shutil.copy(REPOSITORY / "jobs" / "retrain.toml", folder / "jobs")
    shutil.copytree(REPOSITORY / "notebooks" / "retrain", folder / "notebooks" / "retrain")
    env = {"HPCML_DATA": str(folder / "data"), "HPCML_SITE": "local"}
    done = subprocess.run([*HPCML, "data", "fetch", "digits"], env={**os.environ, **env}, cwd=folder, timeout=300)
    assert done.returncode == 0
    return folder


def test_a_retraining_from_data_to_promoted_model(cluster: Cluster, lifecycle: Path) -> None:
    done = call(cluster, lifecycle, *HPCML, "submit", "jobs/retrain.toml", "-p", "epochs=2", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"register +COMPLETED .*MNIST/1 is champion now: accuracy 0\.\d+; there was none before", done.stdout
    )
    first = newest(lifecycle)
    assert first.report.is_file() and first.child("train").report.is_file()

    # Without anybody waiting: the jobs leave it to `sync`, which does it once.
    done = call(cluster, lifecycle, *HPCML, "submit", "jobs/retrain.toml", "--from", "train", "-p", "epochs=4")
    assert done.returncode == 0 and "fetch: MNIST/1 is champion" in done.stdout, done.stdout + done.stderr
    run = newest(lifecycle)
    until(lambda: not jobs(cluster), "the last job ends")
    assert told(cluster, lifecycle, run)[""] == ("COMPLETING", f"register and report: hpcml sync {run.id}")
    for words in ("register: MNIST/2 is champion now", f"{run.id} is in MLflow"):
        done = call(cluster, lifecycle, *HPCML, "sync", run.id)
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    assert told(cluster, lifecycle, run)[""] == ("COMPLETED", "")
    listed = json.loads(call(cluster, lifecycle, *HPCML, "model", "list", "MNIST", "--json").stdout)
    assert [(one["version"], one["aliases"], one["run"]) for one in listed] == [
        (2, ["champion"], f"{run.id}/train"), (1, [], f"{first.id}/train"),
    ]  # fmt: skip
    records = (run.child("train").events / "0.0.rank.jsonl").read_text()
    assert '"Phase":"Retraining"' in records


def test_with_a_server_register_and_report_are_jobs_too(cluster: Cluster, tmp_path: Path, lifecycle: Path) -> None:
    from mlflow_server import Server

    (lifecycle / "mlflow").mkdir()
    server = Server(lifecycle / "mlflow")
    try:
        more = {"MLFLOW_TRACKING_URI": server.uri}
        words = ["submit", "jobs/retrain.toml", "-p", "epochs=1", "--json"]
        done = call(cluster, lifecycle, *HPCML, *words, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(json.loads(done.stdout)["slurm_job_ids"]) == ["prepare", "train", "evaluate", "register", "report"]
        run = newest(lifecycle)
        until(lambda: not jobs(cluster), "the last job ends")
        seen = told(cluster, lifecycle, run)
        assert seen[""] == ("COMPLETED", ""), (seen, *(p.read_text() for p in queue.log_paths(run)))
        decision = rundir.read_json(run.child("register").artifacts / "decision.json")
        assert decision["version"] == "MNIST/1" and run.report.is_file()
    finally:
        server.kill()
