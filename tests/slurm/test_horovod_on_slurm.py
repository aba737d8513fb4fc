"""Horovod on a real Slurm: the batch script as committed, two nodes by a number, a rank that dies. No ssh, no mpirun."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from calls import HPCML, call, logs, marker, only_run

if TYPE_CHECKING:
    from conftest import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: scripts/setup --horovod")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own with the committed job and notebook."""
    folder = tmp_path / "project"
    for name in ("jobs", "notebooks"):
        (folder / name).mkdir(parents=True)
        for path in (REPOSITORY / name).glob("*orovod*"):
            shutil.copy(path, folder / name)
    shutil.copy(REPOSITORY / "jobs/mnist.toml", folder / "jobs")
    (folder / "pyproject.toml").touch()
    return folder


def test_the_batch_script_as_committed(cluster: Cluster, project: Path) -> None:
    done = call(cluster, project, "sbatch", "--wait", "jobs/mnist_horovod.sbatch")
    output = "".join(p.read_text() for p in project.glob("slurm-*.out"))
    assert done.returncode == 0, output
    run = only_run(project)
    assert (marker(run)["state"], marker(run)["replicas_in_sync"]) == ("COMPLETED", 2)
    assert float(re.findall(r"val_accuracy ([0-9.]+)", (run / "logs/out.0.txt").read_text())[-1]) > 0.85


def test_two_nodes_by_a_number_in_the_job(cluster2: Cluster, project: Path) -> None:
    words = ["submit", "jobs/mnist_horovod.toml", "-p", "epochs=1", "--set", "resources.nodes=2", "--wait"]
    done = call(cluster2, project, *HPCML, *words)
    run = only_run(project)
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    assert marker(run)["replicas_in_sync"] == 4


def test_a_dead_rank_ends_the_job_and_is_named(cluster: Cluster, project: Path) -> None:
    script = (REPOSITORY / "notebooks/simple2GPUsHorovod.py").read_text()
    line = "        optimizer.zero_grad()\n"
    assert script.count(line) == 1
    death = "        if rank == 1:\n            raise RuntimeError('rank 1 has had enough')\n"
    (project / "work.py").write_text(script.replace(line, death + line))
    text = (project / "jobs/mnist_horovod.toml").read_text()
    job = re.sub(r"^notebook .*$", 'script = "work.py"', text, flags=re.MULTILINE)
    (project / "jobs/dead.toml").write_text(job)
    done = call(cluster, project, *HPCML, "submit", "jobs/dead.toml", "--wait")
    run = only_run(project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert marker(run)["reason"] == "RuntimeError: rank 1 has had enough", logs(run)
