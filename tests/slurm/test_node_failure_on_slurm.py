"""A node is lost under a job, on a real Slurm: its slurmd is killed, with all that ran there or without."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from calls import HPCML, call, logs, until
from conftest import devcluster, session_cluster, skip_without_slurm
from test_survival_on_slurm import TRAIN, final, holding, submitted, weights

from hpcml import rundir

if TYPE_CHECKING:
    from conftest import Cluster

# After this long a silent node is down; a third of it lies between two looks.
SLURMD_TIMEOUT_S = 9
# What a job may take to end when one of its ranks is gone; a lost node is known only after SlurmdTimeout.
END_S = 30


@pytest.fixture
def cluster3(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three nodes, of which a test may break one."""
    skip_without_slurm()
    for own in session_cluster(request.getfixturevalue("devcluster_base"), "broken", "--nodes", "3"):
        conf = own.directory / "slurm.conf"
        text = conf.read_text()
        assert "SlurmdTimeout=30\n" in text
        conf.write_text(text.replace("SlurmdTimeout=30\n", f"SlurmdTimeout={SLURMD_TIMEOUT_S}\n"))
        assert own.run("scontrol", "reconfigure").returncode == 0
        yield own


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(TRAIN)
    return folder


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def of_node(node: str, run: Path) -> set[int]:
    """Processes of a run on one of the nodes, which are all this machine, and the slurmstepd above them."""
    found = set()
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            given = environment(int(proc.name))
            if given.get("SLURMD_NODENAME") == node and given.get("HPCML_RUN") == run.name:
                found |= {int(proc.name), int(re.findall(r"PPid:\s+(\d+)", (proc / "status").read_text())[0])}
        except OSError:
            continue
    return found - {1}


def slurmd_of(cluster: Cluster, node: str) -> int:
    status = devcluster(cluster.directory.parent, "status", "--name", cluster.name)
    return int(re.findall(rf"slurmd-{node} +alive, pid (\d+)", status.stdout)[0])


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/cwd").exists()


def whole(checkpoint: Path) -> bool:
    """Whether each file is what its manifest says."""
    files = rundir.read_json(checkpoint / "checkpoint.json")["files"]
    return {name: digest for name, (_, digest) in files.items()} == {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in files
    }


def node_of(pid_file: Path) -> tuple[str, int]:
    until(lambda: pid_file.exists() and bool(pid_file.read_text()), "the rank is there")
    pid = int(pid_file.read_text())
    return environment(pid)["SLURMD_NODENAME"], pid


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last line of a training that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(TRAIN)
    run = submitted(cluster, folder)
    assert final(cluster, folder, run)["state"] == "COMPLETED", logs(run.path)
    return weights(run)


def test_on_the_nodes_that_are_left_it_goes_on_from_the_checkpoint(
    cluster3: Cluster, project: Path, uninterrupted: str
) -> None:
    run = submitted(cluster3, project, nodes=2, holds="0:45", pace=0.12)
    holding(run)
    assert rundir.kept_at(run)[0] == 0
    node, pid = node_of(run.path / "pid.1.0")
    lost = {slurmd_of(cluster3, node), *of_node(node, run.path)}
    assert pid in lost and len(lost) >= 4, "slurmd, slurmstepd, worker, work"
    for one in lost:
        os.kill(one, signal.SIGKILL)
    end = final(cluster3, project, run)
    assert (end["state"], end["restarts"]) == ("COMPLETED", 1), (end, logs(run.path))
    assert weights(run) == uninterrupted
    assert "goes on from step" in run.log(0).read_text()
    assert node not in cluster3.run("squeue", "--all", "--states=all", "--noheader", "--format=%N").stdout


def test_a_first_execution_that_is_still_alive_harms_nothing(
    cluster3: Cluster, project: Path, uninterrupted: str
) -> None:
    """Only its slurmd is gone: Slurm gives the node up and starts the job elsewhere, while the first one trains on."""
    run = submitted(cluster3, project, holds="0:45", pace=0.12, slow=3)
    holding(run)
    node, first = node_of(run.path / "pid.0.0")
    os.kill(slurmd_of(cluster3, node), signal.SIGKILL)
    other, _ = node_of(run.path / "pid.0.1")
    assert other != node
    end = final(cluster3, project, run)
    until(lambda: not alive(first), "the first execution ends by itself")
    assert (end["state"], end["restarts"], end["replicas_in_sync"]) == ("COMPLETED", 1, 2), (end, logs(run.path))
    lines = run.log(0).read_text().splitlines()
    assert any("LeaseLost" in line and "restart 1 holds its checkpoints" in line for line in lines), logs(run.path)
    assert [line for line in lines if line.startswith("WEIGHTS")] == [uninterrupted]
    kept = list(run.checkpoints.glob("step-*"))
    assert len(kept) == 2 and all(map(whole, kept)), kept
    until(lambda: not of_node(node, run.path), "its workers have ended too")
    assert rundir.read_json(run.status)["restarts"] == 1, "what the first one left is not the run's"
    assert {rundir.read_json(run.status_of(rank))["restart"] for rank in (0, 1)} == {1}


WAITS = """
import os, time
from hpcml.node import batch
(batch.current_run().path / f"pid.{os.environ['SLURM_PROCID']}").write_text(str(os.getpid()))
time.sleep(600)
"""


def test_a_job_that_may_not_be_requeued_ends(cluster3: Cluster, project: Path) -> None:
    (project / "waits.py").write_text(WAITS)
    (project / "waits.toml").write_text(
        'script = "waits.py"\n[resources]\nnodes = 2\n[slurm]\nextra = ["--no-requeue"]\n[env]\n'
        'vars = {MLFLOW_TRACKING_URI = "http://127.0.0.1:9"}\n'
    )
    path = call(cluster3, project, *HPCML, "submit", "waits.toml", "--json")
    assert path.returncode == 0, path.stderr
    run = rundir.find(project / "runs", None)
    node_of(run.path / "pid.0")
    node, _ = node_of(run.path / "pid.1")
    for one in {slurmd_of(cluster3, node), *of_node(node, run.path)}:
        os.kill(one, signal.SIGKILL)
    died = time.monotonic()
    end = final(cluster3, project, run)
    took = time.monotonic() - died
    print(f"the job ended {took:.0f} s later: {end['state']}, {end['reason']}")
    assert (end["state"], end["reason"]) == ("NODE_FAIL", "a node of the job was lost"), (end, logs(run.path))
    assert took < 2 * SLURMD_TIMEOUT_S + END_S
