"""The main job on a real Slurm: batch scripts as committed, submit, two nodes, failures, limits, with and without sacct."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from calls import HPCML, call, marker, only_run, until

if TYPE_CHECKING:
    from conftest import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
VARIANTS = {"mnist-original": 1, "mnist-mirrored": 2, "mnist-multiworker": 2}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own with the committed jobs and notebooks; runs and MLflow's data land in it."""
    folder = tmp_path / "project"
    for name in ("jobs", "notebooks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "pyproject.toml").touch()
    return folder


def metrics(run: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in (run / "events" / "0.0.rank.jsonl").read_text().splitlines():
        record = json.loads(line)
        values |= record["values"] if record["kind"] == "metric" else {}
    return values


@pytest.mark.parametrize("name", VARIANTS)
def test_each_batch_script_as_committed(cluster: Cluster, project: Path, name: str) -> None:
    done = call(cluster, project, "sbatch", "--wait", f"jobs/{name.replace('-', '_')}.sbatch")
    output = "".join(p.read_text() for p in project.glob("slurm-*.out"))
    assert done.returncode == 0, output
    run = only_run(project)
    assert marker(run)["state"] == "COMPLETED"
    assert marker(run)["replicas_in_sync"] == VARIANTS[name]
    assert metrics(run)["val_accuracy"] > 0.85
    notebook = nbformat.read(run / "notebook.ipynb", as_version=4)
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")
    assert "val_accuracy" in output
    assert re.search(r"\[cell 7/7\]", output), "the log tells where it is"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's use of SQLAlchemy 2.1
def test_submit_and_wait_shows_progress_and_delivers(cluster: Cluster, project: Path) -> None:
    words = ["submit", "jobs/mnist_multiworker.toml", "-p", "epochs=2", "--wait"]
    done = call(cluster, project, *HPCML, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED" in done.stdout
    assert "cell 7/7" in done.stderr
    assert re.search(r"epoch [12]/2", done.stderr)
    run = only_run(project)
    shown = call(cluster, project, *HPCML, "submit", "jobs/mnist_multiworker.toml", "-p", "epochs=2", "--dry-run")
    assert (run / "job.sbatch").read_text() == shown.stdout, "what was shown is what was submitted"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("MNIST")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert len(client.get_metric_history(tracked.info.run_id, "val_accuracy")) == 2
    assert "notebook.ipynb" in {item.path for item in client.list_artifacts(tracked.info.run_id)}


def test_two_nodes_with_two_tasks_each_train_as_one(cluster2: Cluster, project: Path) -> None:
    words = ["submit", "jobs/mnist_multiworker.toml", "-p", "epochs=1", "--set", "resources.nodes=2", "--wait"]
    done = call(cluster2, project, *HPCML, *words)
    run = only_run(project)
    logs = "".join(path.read_text() for path in sorted((run / "logs").glob("out.*.txt")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert marker(run)["replicas_in_sync"] == 4
    assert {path.name for path in run.glob("notebook*.ipynb")} == {
        "notebook.ipynb",
        *(f"notebook.{r}.ipynb" for r in (1, 2, 3)),
    }


def test_a_comparison_is_one_job_with_a_step_for_each_variant(cluster: Cluster, project: Path) -> None:
    jobs = [f"jobs/{name.replace('-', '_')}.toml" for name in ("mnist-original", "mnist-mirrored")]
    done = call(cluster, project, *HPCML, "compare", *jobs, "-p", "epochs=1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(project)
    assert {marker(run / name)["slurm_job_id"] for name in ("mnist-original", "mnist-mirrored")} == {
        marker(run)["slurm_job_id"]
    }
    assert [row["measured"]["replicas"] for row in json.loads(done.stdout)["rows"]] == [1, 2]
    assert (run / "comparison.png").read_bytes().startswith(b"\x89PNG")


DEVICES = """\
import os, pathlib, hpcml
run = hpcml.begin()
import json
opened = []
for node in pathlib.Path(os.environ["GPU_NODES"]).glob("nvidia*"):
    try:
        os.close(os.open(node, os.O_RDWR))
        opened.append(node.name)
    except OSError:
        pass
print("SEES", json.dumps([run.topology.rank, os.environ["CUDA_VISIBLE_DEVICES"], sorted(opened)]))
"""


@pytest.mark.parametrize("flags", [["--gpus-per-task=1"], ["--gres=gpu:2"]])
def test_each_task_has_its_own_gpu_under_cgroup_constraints(
    cluster_cgroup: Cluster, project: Path, flags: list[str]
) -> None:
    """Position 0 in both tasks where each sees one device; positions 0 and 1 where both see two."""
    (project / "devices.py").write_text(DEVICES)
    nodes = str(cluster_cgroup.directory / "dev")
    words = ["srun", "-n2", "-c1", *flags, sys.executable, "devices.py"]
    done = call(cluster_cgroup, project, *words, GPU_NODES=nodes, HPCML_DEVICES="auto")
    seen = sorted(json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("SEES"))
    assert len(seen) == 2, done.stdout + done.stderr
    if flags == ["--gpus-per-task=1"]:
        assert [positions for _, positions, _ in seen] == ["0", "0"]
        assert seen[0][2] != seen[1][2], "the same device in both tasks"
        assert all(len(opened) == 1 for *_, opened in seen)
    else:
        assert [positions for _, positions, _ in seen] == ["0", "1"]


def test_a_failing_cell_fails_the_job_in_three_lines(cluster: Cluster, project: Path) -> None:
    path = project / "notebooks/simple2GPUsOrig.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell("print('before')\nraise RuntimeError('no such luck')"))
    nbformat.write(notebook, path)
    done = call(cluster, project, *HPCML, "submit", "jobs/mnist_original.toml", "--wait")
    assert done.returncode == 1
    run = only_run(project)
    assert marker(run)["state"] == "FAILED"
    assert "RuntimeError: no such luck" in marker(run)["reason"]
    log = (run / "logs/out.0.txt").read_text()
    assert "before" in log and "RuntimeError: no such luck" in log
    assert "Traceback" not in done.stderr.split("last lines")[0], "no traceback of hpcml's own"
    executed = nbformat.read(run / "notebook.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in executed.cells for output in cell.get("outputs", []))


def sleeper(project: Path, body: str = "import time\nprint('started', flush=True)\ntime.sleep(600)\n") -> Path:
    (project / "sleep.py").write_text(body)
    (project / "jobs/sleep.toml").write_text('script = "sleep.py"\n[resources]\ntime = "10"\n')
    return project / "jobs/sleep.toml"


def submitted(cluster: Cluster, project: Path, *more: str) -> dict[str, Any]:
    done = call(cluster, project, *HPCML, "submit", "jobs/sleep.toml", "--json", *more)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    # Of any rank: one that is cleared away after another's death may never come to print it.
    until(lambda: any("started" in p.read_text() for p in Path(run["path"]).glob("logs/out.*.txt")), "the job starts")
    return run


def settled(cluster: Cluster, project: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}

    def ended() -> bool:
        state.update(json.loads(call(cluster, project, *HPCML, "status", "--json").stdout))
        return state["name"] not in ("PENDING", "RUNNING", "COMPLETING")

    until(ended, "the run ends")
    return state


@pytest.mark.parametrize("kind", ["cluster", "cluster_accounting"])
def test_cancel(kind: str, project: Path, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    sleeper(project)
    submitted(cluster, project)
    done = call(cluster, project, *HPCML, "cancel")
    assert done.returncode == 0 and "cancelled job" in done.stdout
    assert settled(cluster, project)["name"] == "CANCELLED"
    again = call(cluster, project, *HPCML, "cancel")
    assert again.returncode == 0 and "ended already" in again.stdout


@pytest.mark.parametrize("kind", ["cluster", "cluster_accounting"])
def test_past_the_time_limit_it_is_timeout(kind: str, project: Path, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    sleeper(project)
    run = submitted(cluster, project)
    cluster.run("scontrol", "update", f"JobId={run['slurm_job_id']}", "EndTime=now")
    assert settled(cluster, project)["name"] == "TIMEOUT"
    assert json.loads((Path(run["path"]) / "stop").read_text())["signal"] == "SIGTERM"


def test_a_killed_rank_ends_the_job_and_names_itself(cluster: Cluster, project: Path) -> None:
    body = (
        "import os, time, signal\nprint('started', flush=True)\n"
        "if os.environ['SLURM_PROCID'] == '1':\n    raise ValueError('rank 1 has had enough')\ntime.sleep(600)\n"
    )
    sleeper(project, body)
    submitted(cluster, project, "--set", "resources.tasks_per_node=2")
    state = settled(cluster, project)
    assert (state["name"], state["reason"]) == ("FAILED", "ValueError: rank 1 has had enough")


def test_waiting_reason_is_shown_and_ctrl_c_leaves_the_job(cluster: Cluster, project: Path) -> None:
    sleeper(project)
    blocker = submitted(cluster, project, "--set", "resources.gpus_per_node=2")
    env = {**cluster.env, "HPCML_PYTHON": sys.executable, "HPCML_RUNS": str(project / "runs")}
    words = [*HPCML, "submit", "jobs/sleep.toml", "--set", "resources.gpus_per_node=1", "--wait"]
    waiting = subprocess.Popen(words, cwd=project, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    while "Resources" not in line and "Priority" not in line:
        assert line, "the wait ended early"
        line = waiting.stderr.readline()
    assert "PENDING" in line
    waiting.send_signal(2)
    _, rest = waiting.communicate(timeout=30)
    assert waiting.returncode == 130 and "hpcml cancel" in rest
    queue = cluster.run("squeue", "--noheader", "--format=%A %T").stdout
    assert "PENDING" in queue
    call(cluster, project, *HPCML, "cancel")
    call(cluster, project, *HPCML, "cancel", str(blocker["slurm_job_id"]))


def test_gpus_allocated_but_not_seen_by_tensorflow_fail_the_run(cluster: Cluster, project: Path) -> None:
    """The cluster's GPUs are not real: without HPCML_DEVICES=cpu that must not become a silent CPU run."""
    words = ["submit", "jobs/mnist_original.toml", "--wait"]
    done = call(cluster, project, *HPCML, *words, HPCML_DEVICES="auto")
    assert done.returncode == 1
    reason = marker(only_run(project))["reason"]
    assert "GPU" in reason, reason


def test_sbatch_refuses_and_nothing_stays(cluster: Cluster, project: Path) -> None:
    sleeper(project)
    done = call(cluster, project, *HPCML, "submit", "jobs/sleep.toml", "--set", "slurm.reservation=nobody-has-it")
    assert done.returncode == 2 and "sbatch refused" in done.stderr
    assert not list((project / "runs").glob("*/plan.json"))


def test_nodes_seen_by_site_detect_and_check(cluster: Cluster, project: Path) -> None:
    found = call(cluster, project, *HPCML, "site", "detect", "-o", "here.toml")
    assert found.returncode == 0, found.stderr
    text = (project / "here.toml").read_text()
    assert 'gpu_request   = "gpu:a100:{count}"' in text and "gpus_per_node   = 2" in text
    check = call(cluster, project, *HPCML, "check", "jobs/mnist_multiworker.toml", "--site", "here.toml", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(check.stdout)}
    assert check.returncode == 0, check.stdout
    assert findings["queue"]["verdict"] == "good" and os.uname().sysname == "Linux"
