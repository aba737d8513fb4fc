"""A Keras training on two workers that is stopped or put back into the queue goes on where it was, on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras_training
import pytest
from calls import HPCML, call, logs, until

from hpcml import rundir
from hpcml.rundir import RunDir

if TYPE_CHECKING:
    from conftest import Cluster

pytest.importorskip("tf_keras", reason="TensorFlow: not installed (pip install 'hpcml[tensorflow]')")


def submitted(cluster: Cluster, folder: Path, *, holds: str = "", requeues: int = 0, time: str = "00:10:00") -> RunDir:
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(keras_training.TRAIN)
    job = keras_training.JOB.format(strategy="multiworker", holds=holds, requeues=requeues, time=time)
    (folder / "job.toml").write_text(job)
    done = call(cluster, folder, *HPCML, "submit", "job.toml", "--json")
    assert done.returncode == 0, done.stderr
    path = Path(json.loads(done.stdout)["path"])
    return RunDir(path.parent, path.name)


def final(cluster: Cluster, folder: Path, run: RunDir) -> dict[str, Any]:
    """Wait for the run's end, and return its marker with the state that a person is told."""
    told: dict[str, Any] = {}

    def ended() -> bool:
        told.update(json.loads(call(cluster, folder, *HPCML, "status", run.id, "--json").stdout))
        return told["name"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "UNKNOWN")

    until(ended, "the run ends")
    return {**rundir.read_json(run.status), "state": told["name"]}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The last lines of a training that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = submitted(cluster, folder)
    assert final(cluster, folder, run)["state"] == "COMPLETED", logs(run.path)
    return keras_training.weights(run)


def test_asked_to_stop_and_resumed_it_ends_with_the_same_bits(
    cluster: Cluster, tmp_path: Path, undisturbed: list[str]
) -> None:
    run = submitted(cluster, tmp_path, holds="0:3")
    until(lambda: len(list(run.path.glob("holding.*.0"))) == 2, "the training is where it is to be stopped")
    cluster.run("scancel", "--signal=USR2", str(rundir.slurm_job_id(run)))
    end = final(cluster, tmp_path, run)
    assert (end["state"], end["exit_code"], end["signal"]) == ("CANCELLED", 75, "SIGUSR2"), (end, logs(run.path))
    assert "a checkpoint is kept at step 24, the end of epoch 3" in end["reason"]
    done = call(cluster, tmp_path, *HPCML, "resume", run.id, "--wait")
    assert done.returncode == 0, (done.stdout, done.stderr, logs(run.path))
    assert "goes on from step 24" in done.stdout
    assert keras_training.weights(run) == undisturbed


def test_before_its_time_limit_it_is_requeued_and_ends_with_the_same_bits(
    cluster: Cluster, tmp_path: Path, undisturbed: list[str]
) -> None:
    # The steps are warned half of the limit before it, and Slurm does that up to 60 s early: after 30 to 60 s here.
    run = submitted(cluster, tmp_path, holds="0:3", requeues=1, time="00:03:00")
    end = final(cluster, tmp_path, run)
    assert (end["state"], end["restarts"]) == ("COMPLETED", 1), (end, logs(run.path))
    assert "goes on from step 24, the end of epoch 3" in logs(run.path)
    assert keras_training.weights(run) == undisturbed
