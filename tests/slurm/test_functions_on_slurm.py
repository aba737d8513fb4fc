"""``hpcml.submit`` and ``hpcml.map`` on a real Slurm, with and without accounting."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster

PATIENCE_S = 60
# Slurm's least time limit is a minute, which it acts on up to 30 s late.
LIMIT_S = 150

# What every script begins with; it answers with JSON on its last line.
HEAD = """\
import json, os, pickle, sys, time
from pathlib import Path
import hpcml
from hpcml.job import Job, Resources, SlurmOptions
from hpcml.launch.functions import RemoteError

def job(slurm=SlurmOptions(), **resources):
    return Job("ignored", "function", (), Path.cwd(), resources=Resources(**resources), slurm=slurm)

def failure(future):
    try:
        return {"result": future.result(60)}
    except RemoteError as error:
        return {"state": error.state, "kind": error.kind, "says": str(error)}
"""


def answer(cluster: Cluster, folder: Path, body: str, **options: Any) -> Any:
    """Run a script as a user of the cluster would, in a project of its own; return what it printed last."""
    script = folder / "session.py"
    script.write_text(HEAD + body)
    environment = {**cluster.env, "HPCML_PROJECT": str(folder), "PYTHONWARNINGS": "error"}
    done = cluster.run(sys.executable, script, cwd=folder, timeout=LIMIT_S, **{"env": environment, **options})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["cluster", "cluster_accounting"])
def slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    yield request.getfixturevalue(request.param)


@pytest.fixture(scope="module", autouse=True)
def endless(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A function that sleeps past its limit of a minute, submitted before the other tests so that they use the time."""
    folder = tmp_path_factory.mktemp("endless")
    body = """
future = hpcml.submit(time.sleep, 600, job=job(time="00:01:00"))
Path("future").write_bytes(pickle.dumps(future))
print(json.dumps(future.run.id))
"""
    return folder, answer(cluster, folder, body)


def test_a_result_and_what_the_function_found(slurm: Cluster, tmp_path: Path) -> None:
    body = """
def look(first, *, second):
    return {
        "sum": first + second, "cwd": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"],
        "cpus": os.environ["SLURM_CPUS_PER_TASK"], "inside": hpcml.begin().dir.id,
    }
future = hpcml.submit(look, 40, second=2, job=job(cpus_per_task=2))
found = future.result(60)
state = future.state()
print(json.dumps({
    **found, "run": future.run.id, "job": future.job_id,
    "state": [state.name, state.source, state.slurm_job_id],
    "slurm_log": [p.name for p in future.run.logs.glob("slurm-*")],
    "open": [str(p) for p in future.run.path.rglob("*") if p.stat().st_mode & 0o077],
}))
"""
    found = answer(slurm, tmp_path, body)

    assert found["sum"] == 42
    assert found["cwd"] == str(tmp_path)
    assert found["cpus"] == "2"
    assert found["threads"] in ("1", "2")  # two, or as many as this machine has
    assert found["inside"] == found["run"]
    assert found["state"] == ["COMPLETED", "marker", int(found["job"])]
    assert found["slurm_log"] == [f"slurm-{found['job']}.out"]
    assert found["open"] == []


def test_an_exception_comes_back_with_its_traceback(slurm: Cluster, tmp_path: Path) -> None:
    body = """
def divide(by):
    return 1 / by
print(json.dumps(failure(hpcml.submit(divide, 0))))
"""
    failed = answer(slurm, tmp_path, body)
    assert (failed["state"], failed["kind"]) == ("FAILED", "ZeroDivisionError")
    assert "in divide\n    return 1 / by" in failed["says"]


def test_a_map_is_one_array_with_a_run_for_each_call(slurm: Cluster, tmp_path: Path) -> None:
    body = """
from hpcml import queue, rundir
def index(number):
    return number, os.environ["SLURM_ARRAY_TASK_ID"], hpcml.begin().dir.id
futures = hpcml.map(index, range(8))
results = [future.result(60) for future in futures]
parent = rundir.RunDir(futures[0].run.root, futures[0].run.id.split("/")[0])
print(json.dumps({
    "results": results, "jobs": [f.job_id for f in futures], "runs": [f.run.id for f in futures],
    "states": [f.state().name for f in futures], "whole": queue.state_of(parent).name,
    "logs": [[p.name for p in f.run.logs.glob("slurm-*")] for f in futures],
}))
"""
    found = answer(slurm, tmp_path, body)

    array = found["jobs"][0].split("_")[0]
    assert found["jobs"] == [f"{array}_{index}" for index in range(8)]
    assert found["results"] == [[index, str(index), run] for index, run in enumerate(found["runs"])]
    assert found["runs"] == [f"{found['runs'][0].split('/')[0]}/{index}" for index in range(8)]
    assert found["states"] == ["COMPLETED"] * 8
    assert found["whole"] == "COMPLETED"
    assert found["logs"] == [[f"slurm-{array}_{index}.out"] for index in range(8)]


def test_cancelling_one_of_an_array_leaves_the_others(slurm: Cluster, tmp_path: Path) -> None:
    body = """
def wait(number):
    while not Path("go").exists():
        time.sleep(0.1)
    return number
futures = hpcml.map(wait, range(3))
try:
    futures[0].result(1)
except TimeoutError as error:
    late = str(error)
futures[1].cancel()
ended = failure(futures[1])
Path("go").touch()
print(json.dumps({"late": late, "ended": ended, "others": [futures[0].result(60), futures[2].result(60)]}))
"""
    found = answer(slurm, tmp_path, body)
    assert "goes on" in found["late"]
    assert found["ended"]["state"] == "CANCELLED"
    assert "has no result" in found["ended"]["says"]
    assert found["others"] == [0, 2]


def test_a_killed_function_is_an_error_and_no_hang(slurm: Cluster, tmp_path: Path) -> None:
    body = "print(json.dumps(failure(hpcml.submit(os.kill, 0, 9))))"  # 0: the whole group
    ended = answer(slurm, tmp_path, body)
    assert (ended["state"], ended["kind"]) == ("FAILED", "")
    assert "SIGKILL" in ended["says"]


def test_two_tasks_have_a_result_each_and_one_that_fails_ends_the_other(slurm: Cluster, tmp_path: Path) -> None:
    body = """
def rank(fails):
    number = int(os.environ["SLURM_PROCID"])
    if fails and number == 1:
        raise LookupError("the second")
    if fails:
        time.sleep(600)
    return number
pair = job(tasks_per_node=2)
good, bad = hpcml.submit(rank, False, job=pair), hpcml.submit(rank, True, job=pair)
print(json.dumps({"good": good.results(60), "first": good.result(), "bad": failure(bad)}))
"""
    found = answer(slurm, tmp_path, body)
    assert found["good"] == [0, 1]
    assert found["first"] == 0
    assert found["bad"]["kind"] == "LookupError"
    assert "on rank 1: the second" in found["bad"]["says"]


def test_a_function_submits_from_inside_a_job(slurm: Cluster, tmp_path: Path) -> None:
    body = """
def inner():
    own = ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "HPCML_RUN", "OMP_NUM_THREADS")
    return [os.environ[name] for name in own]
def outer():
    future = hpcml.submit(inner, job=job(cpus_per_task=3))
    return os.environ["SLURM_JOB_ID"], future.job_id, future.run.id, future.result(60)
print(json.dumps(hpcml.submit(outer).result(60)))
"""
    job_id, inner_id, inner_run, found = answer(slurm, tmp_path, body)
    assert job_id != inner_id
    cores = len(os.sched_getaffinity(0))
    assert found == [inner_id, "3", inner_run, str(min(cores, 3))]  # not the one thread of the outer


def test_what_slurm_refuses_leaves_nothing(slurm: Cluster, tmp_path: Path) -> None:
    body = """
said = []
for wanted in (job(slurm=SlurmOptions(constraint="nothing-has-this")), job(nodes=5)):
    try:
        hpcml.map(abs, [1, 2], job=wanted)
    except hpcml.errors.HpcmlError as error:
        said.append([error.exit_code, str(error)])
runs = Path("runs")
print(json.dumps({"said": said, "left": [p.name for p in runs.iterdir() if p.is_dir()] if runs.exists() else []}))
"""
    found = answer(slurm, tmp_path, body)
    (refused, why), (over, most) = found["said"]
    assert (refused, over) == (2, 2)
    assert "the function was refused" in why
    assert "feature" in why
    assert "5 nodes is more than there are" in most
    assert found["left"] == []


def test_past_its_time_limit_it_is_a_timeout(cluster: Cluster, endless: tuple[Path, str]) -> None:
    folder, run = endless
    body = """
future = pickle.loads(Path("future").read_bytes())
try:
    future.result(140)
except RemoteError as error:
    print(json.dumps({"state": error.state, "says": str(error)}))
"""
    ended = answer(cluster, folder, body)
    assert ended["state"] == "TIMEOUT"
    assert "has no result" in ended["says"]
    assert f"hpcml logs {run}" in ended["says"]
