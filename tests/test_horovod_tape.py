"""A loop with ``tf.GradientTape`` under Horovod that has its ranks compared, as a run of two of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.rundir import RunDir

pytestmark = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: scripts/setup --horovod")

TAPE = """
import hpcml

run = hpcml.begin(strategy="horovod")
import horovod.tensorflow as hvd
import tensorflow as tf

hvd.init()
tf.random.set_seed(3)
inputs = tf.random.normal((64, 4))
data = tf.data.Dataset.from_tensor_slices((inputs, tf.reduce_sum(inputs, 1))).shard(hvd.size(), hvd.rank()).batch(4)
weights = [tf.Variable(tf.random.normal((4,)), name="w"), tf.Variable(0.0, name="b")]
for step, (x, y) in enumerate(data, 1):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((tf.linalg.matvec(x, weights[0]) + weights[1] - y) ** 2)
    {wrap}
    for weight, gradient in zip(weights, tape.gradient(loss, weights)):
        weight.assign_sub(0.1 * gradient)
    if step in (1, len(data)):
        run.check_in_sync(weights, step)
print("trained", step)
hvd.shutdown()
"""
JOB = (
    'script = "work.py"\nstrategy = "horovod"\n[resources]\ngpus_per_node = 2\ntasks_per_node = 2\ncpus_per_task = 1\n'
)


def train(folder: Path, wrap: str) -> tuple[int, RunDir, str]:
    (folder / "pyproject.toml").touch()
    (folder / "job.toml").write_text(JOB)
    (folder / "work.py").write_text(TAPE.format(wrap=wrap))
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    argv = [sys.executable, "-m", "hpcml", "run", "job.toml"]
    done = subprocess.run(argv, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    (path,) = (folder / "runs").glob("*-job")
    run = RunDir(path.parent, path.name)
    return done.returncode, run, done.stdout + done.stderr + run.log(0).read_text()


def test_ranks_whose_tape_averages_are_one_training(tmp_path: Path) -> None:
    code, run, told = train(tmp_path, "tape = hvd.DistributedGradientTape(tape)")
    assert code == 0, told
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 2)


def test_ranks_whose_tape_does_not_are_ended_after_a_step(tmp_path: Path) -> None:
    code, run, told = train(tmp_path, "pass")
    assert (code, rundir.read_json(run.status)["state"]) == (1, "FAILED")
    assert "the weights of rank 1 differ from rank 0's after step 1: the gradients are not averaged" in told
    assert "hvd.DistributedGradientTape" in told
