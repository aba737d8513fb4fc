"""A training that is stopped, killed or put back into the queue goes on where it was, on a real Slurm."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from calls import HPCML, call, logs, until
from conftest import session_cluster, skip_without_slurm

from hpcml import rundir
from hpcml.rundir import RunDir

if TYPE_CHECKING:
    from conftest import Cluster

# From a step that the test chooses on it is so slow that what happens to it happens there.
TRAIN = """
import hashlib, os, random, time
from pathlib import Path
import hpcml

run = hpcml.begin(strategy="ddp")
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(3)
random.seed(rank)
inputs = torch.arange(640.0).reshape(-1, 4) / 640
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
sampler = torch.utils.data.DistributedSampler(data, seed=5)
loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1))
model = torch.nn.parallel.DistributedDataParallel(network)
torch.manual_seed(rank)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
# restart: the step at which it waits to be stopped
holds = {int(pair.split(":")[0]): int(pair.split(":")[1]) for pair in os.environ.get("HOLDS", "").split(",") if pair}
restart = int(os.environ["HPCML_RESTART"])
(run.dir.path / f"pid.{rank}.{restart}").write_text(str(os.getpid()))
step = 0
for epoch in run.epochs(4, model, global_batch=8, keep=[optimizer, scheduler]):
    sampler.set_epoch(epoch)
    for x, y in run.steps(loader):
        loss = torch.nn.functional.mse_loss(model(x) + random.random() / 1000, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(float(os.environ["PACE"]))
        step = int(optimizer.state[next(network.parameters())]["step"])
        if step == holds.get(restart):
            (run.dir.path / f"holding.{rank}.{restart}").touch()
        if step >= holds.get(restart, 10**9):
            time.sleep(float(os.environ["SLOW"]))  # slowly on, until it is stopped
    scheduler.step()
    run.log(step=epoch, loss=float(loss.detach()))
weights = torch.cat([part.detach().reshape(-1) for part in network.parameters()])
digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
print(f"WEIGHTS {digest} after step {step}, {len(run.history['loss'])} epochs", flush=True)
dist.destroy_process_group()
"""
JOB = """
script = "train.py"
name = "train"
strategy = "ddp"
[resources]
nodes = {nodes}
gpus_per_node = {tasks}
tasks_per_node = {tasks}
cpus_per_task = 1
time = "{time}"
[slurm]
max_requeues = {requeues}
[env]
vars = {{HOLDS = "{holds}", PACE = "{pace}", SLOW = "{slow}", MLFLOW_TRACKING_URI = "http://127.0.0.1:9"}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(TRAIN)
    return folder


def submitted(
    cluster: Cluster,
    project: Path,
    *,
    holds: str = "",
    requeues: int = 0,
    time: str = "00:10:00",
    pace: float = 0,
    slow: float = 0.5,
    nodes: int = 1,
) -> RunDir:
    """Queue the training; at a pace of 0.12 s a step an epoch is long enough to be saved at its end."""
    given = {"holds": holds, "requeues": requeues, "time": time, "pace": pace, "slow": slow}
    (project / "job.toml").write_text(JOB.format(**given, nodes=nodes, tasks=2 // nodes))
    done = call(cluster, project, *HPCML, "submit", "job.toml", "--json")
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["path"])
    return RunDir(path.parent, path.name)


def final(cluster: Cluster, project: Path, run: RunDir) -> dict[str, Any]:
    """Wait for the run's end, and return its marker with the state that a person is told."""
    told: dict[str, Any] = {}

    def ended() -> bool:
        told.update(json.loads(call(cluster, project, *HPCML, "status", run.id, "--json").stdout))
        return told["name"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "UNKNOWN")

    until(ended, "the run ends")
    return {**rundir.read_json(run.status), "state": told["name"]}


def holding(run: RunDir, restart: int = 0) -> None:
    until(lambda: (run.path / f"holding.0.{restart}").exists(), "the training is where it is to be stopped")


def weights(run: RunDir) -> str:
    (line,) = [line for line in run.log(0).read_text().splitlines() if line.startswith("WEIGHTS")]
    return line


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last line of a training that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(TRAIN)
    run = submitted(cluster, folder)
    assert final(cluster, folder, run)["state"] == "COMPLETED", logs(run.path)
    line = weights(run)
    assert line.endswith("after step 80, 4 epochs")
    return line


def test_asked_to_stop_and_resumed_it_ends_with_the_same_bits(
    cluster: Cluster, project: Path, uninterrupted: str
) -> None:
    run = submitted(cluster, project, holds="0:47")
    holding(run)
    job = rundir.slurm_job_id(run)
    cluster.run("scancel", "--signal=USR2", str(job))
    end = final(cluster, project, run)
    assert (end["state"], end["exit_code"], end["signal"]) == ("CANCELLED", 75, "SIGUSR2"), (end, logs(run.path))
    assert "stopped by SIGUSR2 after step" in end["reason"] and "a checkpoint is kept at step" in end["reason"]
    done = call(cluster, project, *HPCML, "resume", run.id, "--wait")
    assert done.returncode == 0, (done.stdout, done.stderr, logs(run.path))
    assert "goes on from step" in done.stdout and rundir.slurm_job_id(run) != job
    assert weights(run) == uninterrupted
    assert final(cluster, project, run)["restarts"] == 1


def test_before_its_time_limit_it_is_requeued_and_ends_with_the_same_bits(
    cluster: Cluster, project: Path, uninterrupted: str
) -> None:
    # The steps are warned half of the limit before it, and Slurm does that up to 60 s early: after 30 to 60 s here.
    run = submitted(cluster, project, holds="0:25", requeues=1, time="00:03:00", slow=1.5)
    end = final(cluster, project, run)
    assert (end["state"], end["restarts"]) == ("COMPLETED", 1), (end, logs(run.path))
    assert weights(run) == uninterrupted
    assert "is requeued (restart 1) and goes on from step" in logs(run.path)


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(
    cluster: Cluster, project: Path, uninterrupted: str
) -> None:
    run = submitted(cluster, project, holds="0:45", requeues=1, pace=0.12)
    holding(run)
    kept = rundir.kept_at(run)
    assert kept[0] == 0
    os.kill(int((run.path / "pid.1.0").read_text()), signal.SIGKILL)
    end = final(cluster, project, run)
    assert (end["state"], end["restarts"]) == ("COMPLETED", 1), (end, logs(run.path))
    assert weights(run) == uninterrupted


def test_no_more_often_than_max_requeues(cluster: Cluster, project: Path) -> None:
    run = submitted(cluster, project, holds="0:45,1:65", requeues=1, pace=0.12)
    for restart in (0, 1):
        holding(run, restart)
        os.kill(int((run.path / f"pid.1.{restart}").read_text()), signal.SIGKILL)
    end = final(cluster, project, run)
    assert (end["state"], end["restarts"], end["failed_rank"]) == ("FAILED", 1, 1), (end, logs(run.path))


def test_a_cancelled_run_stays_cancelled(cluster: Cluster, project: Path) -> None:
    run = submitted(cluster, project, holds="0:45", requeues=3, pace=0.12, slow=0.2)
    holding(run)
    assert call(cluster, project, *HPCML, "cancel", run.id).returncode == 0
    assert final(cluster, project, run)["state"] == "CANCELLED"
    assert rundir.kept_at(run)[1] >= 45, "it has saved before it ended"
    assert not (run.path / "pid.0.1").exists()


@pytest.fixture(scope="module")
def cluster_preempt(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster whose partition ``urgent`` takes nodes away from the others."""
    skip_without_slurm()
    yield from session_cluster(request.getfixturevalue("devcluster_base"), "preempt", "--preempt")


def test_a_preempted_run_goes_on_when_the_urgent_job_is_over(
    cluster_preempt: Cluster, project: Path, uninterrupted: str
) -> None:
    run = submitted(cluster_preempt, project, holds="0:45", pace=0.12)
    holding(run)
    urgent = cluster_preempt.run(
        "srun", "--partition=urgent", "--gres=gpu:2", "--exclusive", "true", env=cluster_preempt.env, timeout=120
    )
    assert urgent.returncode == 0, urgent.stderr
    end = final(cluster_preempt, project, run)
    assert (end["state"], end["restarts"]) == ("COMPLETED", 1), (end, logs(run.path))
    assert weights(run) == uninterrupted
    assert "stopped by SIGTERM after step" in run.log(0).read_text(), "it had the time to save"
