"""A Keras training that is stopped, killed or given other checkpoints: it ends where an undisturbed one does.

What TensorFlow sees is fixed when it starts, so it runs in processes of its own: one for each flavour of Keras, each
playing several scenes and telling as JSON what came of them. Several workers are processes of ``hpcml run``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import keras_training
import pytest

from hpcml import rundir
from hpcml.rundir import RunDir

if not (importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tf_keras")):
    pytest.skip("TensorFlow: not installed (pip install 'hpcml[tensorflow]')", allow_module_level=True)

# Everything that a training remembers is in it: slots, a decay of the rate, a rate that a callback lowers, moving means,
# dropout, Python's and NumPy's random numbers, and the order of the data.
SCENES = """
import contextlib, hashlib, json, os, random, shutil, sys, time
from pathlib import Path
import numpy as np
import tensorflow as tf
from hpcml import rundir
from hpcml.errors import HpcmlError, Stopped
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal
from hpcml.training import keras_checkpoint, saving, tensorflow as training

folder = Path(sys.argv[1])
legacy = os.environ["TF_USE_LEGACY_KERAS"] == "1"
training.configure(training.Expected("mirrored", virtual=True, virtual_devices=2), precision="float32")
tf.config.experimental.enable_op_determinism()
x = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")
EPOCHS = 4

class Course(tf.keras.callbacks.Callback):
    # What a user's own callbacks do, last of all: draw random numbers, change the rate, and here ask to stop as well.
    def __init__(self, stop, at):
        super().__init__()
        self.stop, self.at, self.drawn = stop, at, []
    def on_epoch_end(self, epoch, logs=None):
        self.drawn.append([random.random(), float(np.random.normal())])
        rate = self.model.optimizer.learning_rate
        rate.assign(rate * 0.9)
        if epoch + 1 == self.at:
            rundir.write_json(self.stop, {"signal": "SIGUSR2", "restart": 0})

def network(units, strategy):
    random.seed(5)
    tf.keras.utils.set_random_seed(5)
    with strategy.scope():
        model = tf.keras.Sequential([
            tf.keras.Input((4,)), tf.keras.layers.Dense(units), tf.keras.layers.BatchNormalization(),
            tf.keras.layers.Dropout(0.3), tf.keras.layers.Dense(1),
        ])
        model.compile(tf.keras.optimizers.AdamW(0.01), "mse", metrics=["mae"])
    return model

def execution(name, kind="original", *, restart=0, stop=None, units=8, due=False, begins=None, spoil=None):
    run = RunDir(folder, name).make()
    strategy = tf.distribute.MirroredStrategy() if kind == "mirrored" else tf.distribute.get_strategy()
    expected = training.Expected(kind, virtual=True, virtual_devices=2)
    journal = Journal(run.event_file(0, restart, "rank"))
    keeper = keras_checkpoint.Keeper(run, journal, restart, 0, watched=False)
    done = keeper.epochs_done
    model = network(units, strategy)
    if restart:
        random.seed(99)
        np.random.seed(99)
    data = tf.data.Dataset.from_tensor_slices((x, x.sum(1, keepdims=True)))
    def shuffled(epoch):
        return data.shuffle(64, seed=epoch, reshuffle_each_iteration=False).batch(16)
    train = tf.data.Dataset.range(done, EPOCHS).flat_map(shuffled)
    course = Course(run.stop, stop)
    callbacks = training.callbacks(journal, expected, global_batch=16, began=time.perf_counter(), rank=0, keeper=keeper)
    saving.COST = 1e9 if due else 0.01
    if spoil:
        spoil()
    told = {"done": done, "stopped": None}
    try:
        model.fit(train, epochs=EPOCHS, initial_epoch=done if begins is None else begins, steps_per_epoch=4, verbose=0,
                  callbacks=[*callbacks, course])
    except Stopped as stopped:
        told["stopped"] = str(stopped)
    except HpcmlError as error:
        told["error"] = str(error)
    parts = [part for one in model.variables if id(one) not in {id(m) for m in model.metrics}
             for part in getattr(one if legacy else one.value, "values", [one])]
    state = [np.asarray(part).tolist() for part in parts]
    rate = float(model.optimizer.learning_rate.numpy())
    told |= {"state": state, "drawn": course.drawn, "rate": rate, "step": int(model.optimizer.iterations.numpy())}
    told["kept"] = sorted(path.name for path in run.checkpoints.glob("step-*"))
    journal.close()
    return told

told = {}
for kind in ("original", "mirrored"):
    told[kind] = {
        "undisturbed": execution(f"{kind}-undisturbed", kind),
        "stopped": execution(kind, kind, stop=2),
        "resumed": execution(kind, kind, restart=1),
    }
"""
MORE = """
told["every"] = execution("every", due=True)

last = RunDir(folder, "every").checkpoints / told["every"]["kept"][-1]
(last / "common.npz").write_bytes((last / "common.npz").read_bytes()[:-9])
told["truncated"] = execution("every", restart=1)

told["other"] = [execution("other", stop=2), execution("other", restart=1, units=9)]
told["forgotten"] = [execution("forgotten", stop=2), execution("forgotten", restart=1, begins=0)]

import errno
write = keras_checkpoint.State.write
def full():
    def stub(self, folder, rank):
        if "00000008" in folder.name:
            (folder / "common.npz").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, folder, rank)
    keras_checkpoint.State.write = stub
told["full"] = execution("full", stop=2, due=True, spoil=full)
keras_checkpoint.State.write = write

def twice():
    run = RunDir(folder, "twice").make()
    journal = Journal(run.event_file(0, 0, "rank"))
    keeper = keras_checkpoint.Keeper(run, journal, 0, 0, watched=False)
    callbacks = training.callbacks(journal, training.Expected("original", virtual=True), global_batch=16,
                                   began=time.perf_counter(), rank=0, keeper=keeper)
    model = network(8, tf.distribute.get_strategy())
    for _ in range(2):
        model.fit(x, x.sum(1, keepdims=True), batch_size=16, epochs=1, verbose=0, callbacks=callbacks)
    journal.close()
    return int(model.optimizer.iterations.numpy())
told["twice"] = twice()
"""


def told_by(folder: Path, scenes: str, keras: str) -> dict[str, Any]:
    script = f"{scenes}\nprint('TOLD ' + json.dumps(told, default=float))"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": keras, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TF_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(done.stdout.rpartition("TOLD ")[2])
    return {**results, "output": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(tmp_path_factory.mktemp("legacy"), SCENES + MORE, "1")


@pytest.fixture(scope="module")
def keras_3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(tmp_path_factory.mktemp("keras_3"), SCENES, "0")


@pytest.mark.parametrize("flavour", ["legacy", "keras_3"])
@pytest.mark.parametrize("strategy", ["original", "mirrored"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    flavour: str, strategy: str, request: pytest.FixtureRequest
) -> None:
    told = request.getfixturevalue(flavour)[strategy]
    undisturbed, stopped, resumed = told["undisturbed"], told["stopped"], told["resumed"]
    assert stopped["stopped"] == "stopped by SIGUSR2 after step 8; a checkpoint is kept at step 8, the end of epoch 2"
    assert (stopped["done"], resumed["done"]) == (0, 2)
    assert resumed["step"] == undisturbed["step"] == 16
    assert resumed["state"] == undisturbed["state"] != stopped["state"]
    assert resumed["rate"] == undisturbed["rate"] == pytest.approx(0.01 * 0.9**4)
    assert stopped["drawn"] + resumed["drawn"] == undisturbed["drawn"]


def test_what_was_changed_after_it_was_saved_is_passed_over(legacy: dict[str, Any]) -> None:
    assert legacy["every"]["kept"] == ["step-00000008", "step-00000012"]
    assert (legacy["truncated"]["done"], legacy["truncated"]["step"]) == (2, 16)
    assert re.search(r"checkpoint step-00000012 is passed over: common.npz has \d+ bytes", legacy["output"])


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(legacy: dict[str, Any]) -> None:
    stopped, other = legacy["other"]
    assert "of another model: kernel:0 float32 (4, 8) is kept, kernel:0 float32 (4, 9) is here" in other["error"]
    assert other["step"] == 0
    assert other["kept"] == stopped["kept"]


def test_a_fit_that_begins_with_another_epoch_is_told_so(legacy: dict[str, Any]) -> None:
    _, forgotten = legacy["forgotten"]
    assert "begins with epoch 1, but 2 are done" in forgotten["error"]
    assert "initial_epoch=run.epochs_done" in forgotten["error"]


def test_a_full_disk_leaves_the_one_before(legacy: dict[str, Any]) -> None:
    assert legacy["full"]["stopped"] == "stopped by SIGUSR2 after step 8; the checkpoint before is kept"
    assert legacy["full"]["kept"] == ["step-00000004"]
    assert "no checkpoint at step 8, the end of epoch 2: No space left on device" in legacy["output"]


def test_a_second_fit_of_a_run_is_not_kept_and_says_so(legacy: dict[str, Any]) -> None:
    assert legacy["twice"] == 8
    assert "only the first model.fit() of a run is kept" in legacy["output"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "train.py").write_text(keras_training.TRAIN)
    return tmp_path


def started(project: Path, *words: str, holds: str = "") -> subprocess.Popen[str]:
    strategy = "horovod" if "horovod" in (project / "train.py").read_text() else "multiworker"
    job = keras_training.JOB.format(time="00:10:00", requeues=0, holds=holds, strategy=strategy)
    (project / "job.toml").write_text(job)
    own = {"HPCML_SITE": "local", "HPCML_DEVICES": "cpu", "HPCML_RUNS": str(project / "runs")}
    argv = [sys.executable, "-m", "hpcml", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=project, env={**os.environ, **own}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def only_run(project: Path) -> RunDir:
    (path,) = (path.parent for path in (project / "runs").glob("*/plan.json"))
    return RunDir(path.parent, path.name)


def held(project: Path, process: subprocess.Popen[str], restart: int) -> RunDir:
    """Wait until both ranks are in the epoch where they wait, and return the run."""
    deadline = time.monotonic() + 240
    while len(list((project / "runs").glob(f"*/holding.*.{restart}"))) < 2:
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline, "the training does not come to where it waits"
        time.sleep(0.05)
    return only_run(project)


def undisturbed(project: Path) -> list[str]:
    """Return the last lines of the ranks of a training that nothing happens to."""
    folder = project / "undisturbed"
    folder.mkdir()
    for name in ("pyproject.toml", "train.py"):
        (folder / name).write_bytes((project / name).read_bytes())
    code, output = ended(started(folder, "run", "job.toml"))
    assert code == 0, output
    return keras_training.weights(only_run(folder))


def test_two_workers_terminated_then_killed_end_with_the_same_bits(project: Path) -> None:
    expected = undisturbed(project)
    assert all(" after step 40, " in line and line.endswith(", 5 epochs") for line in expected)
    assert len({line.split()[1] for line in expected}) == 1 and len({line.split(", ")[1] for line in expected}) == 2

    process = started(project, "run", "job.toml", holds="0:3,1:5")
    run = held(project, process, 0)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code != 0 and "a checkpoint is kept at step 24, the end of epoch 3" in run.log(0).read_text(), output
    assert rundir.kept_at(run) == (0, 24)

    process = started(project, "resume", run.id, holds="0:3,1:5")
    held(project, process, 1)
    os.kill(int((run.path / "pid.1.1").read_text()), signal.SIGKILL)
    code, output = ended(process)
    assert code == 1, output
    step = rundir.kept_at(run)[1]
    assert step in (24, 32), "of the epochs that were done"

    code, output = ended(started(project, "resume", run.id))
    assert code == 0, output + run.log(0).read_text()
    assert f"goes on from step {step}" in output
    assert keras_training.weights(run) == expected


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: scripts/setup --horovod")
def test_horovod_terminated_and_resumed_ends_with_the_same_bits(project: Path) -> None:
    (project / "train.py").write_text(keras_training.with_horovod())
    expected = undisturbed(project)
    process = started(project, "run", "job.toml", holds="0:3")
    run = held(project, process, 0)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert rundir.kept_at(run) == (0, 24)
    code, output = ended(started(project, "resume", run.id))
    assert code == 0, output + run.log(0).read_text()
    assert keras_training.weights(run) == expected
