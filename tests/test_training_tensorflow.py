"""The TensorFlow helpers against the real TensorFlow, on virtual CPU devices.

What TensorFlow sees is fixed when it starts, so it runs in processes of its own: one for each flavour of Keras, each
playing several scenes and telling as JSON what came of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcml.errors import HpcmlError
from hpcml.tracking import journal
from hpcml.training import recorder
from hpcml.training.common import Expected
from hpcml.training.tensorflow import advice, check_replicas, expected_replicas

ORIGINAL = Expected("original")
ONE_NODE = Expected("multiworker", world=2, gpus_per_task=1)


@pytest.mark.parametrize(
    ("expected", "replicas"),
    [
        (ORIGINAL, 1),
        (Expected("original", gpus_per_task=2), 1),
        (Expected("mirrored", gpus_per_task=2), 2),
        (Expected("mirrored", virtual=True, virtual_devices=3), 3),
        (Expected("mirrored"), 1),
        (Expected("multiworker", gpus_per_task=2), 2),
        (Expected("multiworker", virtual=True, virtual_devices=2), 1),
        (ONE_NODE, 2),
        (Expected("multiworker", world=4, gpus_per_task=2), 8),
        (Expected("multiworker", world=2), 2),
        (Expected("multiworker", world=4, virtual=True), 4),
    ],
)
def test_the_replicas_that_a_strategy_should_have(expected, replicas):
    assert expected_replicas(expected) == replicas
    check_replicas(expected, replicas)
    for wrong in {1, 2, 3, 4, 8} - {replicas}:
        with pytest.raises(HpcmlError, match=rf"strategy '{expected.strategy}': .*{wrong} replicas in sync"):
            check_replicas(expected, wrong)


@pytest.mark.parametrize(
    ("expected", "in_sync"),
    [(ONE_NODE, 1), (Expected("multiworker", world=2, gpus_per_task=2), 2), (Expected("original", world=2), 1)],
)
def test_tasks_that_each_train_the_whole_job_are_told_so(expected, in_sync):
    with pytest.raises(HpcmlError, match=r"each of the 2 tasks trains the whole job(?s:.*)MultiWorkerMirroredStrategy"):
        check_replicas(expected, in_sync)


def test_an_ordinary_run_on_gpus_is_given_no_advice():
    assert advice(Expected("mirrored", gpus_per_task=2), 2) == advice(ONE_NODE, 2) == advice(ORIGINAL, 1) == []


def test_a_run_that_leaves_gpus_idle_is_told_so():
    assert advice(Expected("original", gpus_per_task=2), 1) == [
        "without a strategy 1 of 2 GPUs trains and the rest idle"
    ]


SCENES = """
import json, sys, time
from pathlib import Path
import tensorflow as tf
from hpcml.errors import HpcmlError
from hpcml.tracking.journal import Journal
from hpcml.training import tensorflow as training

folder = Path(sys.argv[1])
told = {}

def tell(name, scene):
    try:
        told[name] = scene()
    except HpcmlError as error:
        told[name] = {"error": str(error)}

def train(name, expected, strategy, *, epochs=2, optimizer=None, callbacks=(), **more):
    recorder = training.callbacks(
        Journal(folder / name / "0.0.rank.jsonl"), expected, global_batch=8, began=time.perf_counter(), rank=0
    )
    with strategy.scope():
        model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2, dtype="float32")])
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer or "sgd", loss, metrics=["accuracy"])
    data = tf.data.Dataset.from_tensor_slices((tf.ones((40, 3)), tf.zeros(40, tf.int64))).batch(8)
    fit = lambda: model.fit(data, epochs=epochs, verbose=0, callbacks=[*callbacks, *recorder], **more).history
    history = fit()
    if name == "twice":
        fit()
    return {"history": history, "train_function": model.train_function.__name__, "recorder": recorder[0]}

def plain(scene):
    return lambda: {"history": scene()["history"]}
"""

LEGACY = """
mirrored = training.Expected("mirrored", virtual=True, virtual_devices=2)
tell("no gpu", lambda: training.configure(training.Expected("mirrored", gpus_per_task=2), precision="float32"))
tell("names", lambda: training.configure(mirrored, precision="float32", seed=5))
tell("again", lambda: training.configure(mirrored, precision="float32"))
tell("mirrored", plain(lambda: train("mirrored", mirrored, tf.distribute.MirroredStrategy(), validation_data=(
    tf.ones((8, 3)), tf.zeros(8, tf.int64)))))
tell("one of two", plain(lambda: train("one of two", mirrored, tf.distribute.MirroredStrategy(["CPU:0"]))))
original = training.Expected("original", virtual=True, virtual_devices=2)
tell("original", plain(lambda: train("original", original, tf.distribute.get_strategy())))
tell("twice", plain(lambda: train("twice", original, tf.distribute.get_strategy(), epochs=1)))
alone = training.Expected("multiworker", virtual=True, virtual_devices=2)
tell("alone", plain(lambda: train("alone", alone, tf.distribute.MultiWorkerMirroredStrategy())))
two = training.Expected("multiworker", world=2, virtual=True)
tell("each the whole", plain(lambda: train("each the whole", two, tf.distribute.MultiWorkerMirroredStrategy())))

class Counter(tf.keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["words"] = "not a number"
tell("odd", plain(lambda: train("odd", original, tf.distribute.get_strategy(), callbacks=[Counter()])))

def hooks():
    result = train("hooks", original, tf.distribute.get_strategy())
    recorder = result["recorder"]
    return {"per batch": recorder._implements_train_batch_hooks(), "train_function": result["train_function"]}
tell("hooks", hooks)
for kind in (tf.keras.optimizers, tf.keras.optimizers.legacy):
    schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=5, decay_rate=0.5, staircase=True)
    name = "schedule" if kind is tf.keras.optimizers else "old schedule"
    tell(name, plain(lambda: train(name, original, tf.distribute.get_strategy(), optimizer=kind.SGD(schedule))))
tell("too late", lambda: training.configure(
    training.Expected("mirrored", virtual=True, virtual_devices=3), precision="float32"))
"""

KERAS_3 = """
original = training.Expected("original", virtual=True)
tell("names", lambda: training.configure(original, precision="mixed_float16"))
told["keras"] = tf.keras.__version__
told["policy"] = tf.keras.mixed_precision.global_policy().name
tell("original", plain(lambda: train("original", original, tf.distribute.get_strategy(), validation_data=(
    tf.ones((8, 3)), tf.zeros(8, tf.int64)))))
schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=5, decay_rate=0.5, staircase=True)
tell("schedule", plain(lambda: train(
    "schedule", original, tf.distribute.get_strategy(), optimizer=tf.keras.optimizers.SGD(schedule))))
"""


class Told:
    """What the scenes of one process told: results by name, and each scene's journal."""

    def __init__(self, folder: Path, scenes: str, keras: str) -> None:
        script = f"{SCENES}\n{scenes}\nprint('TOLD ' + json.dumps(told, default=float))"
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": keras, "CUDA_VISIBLE_DEVICES": "-1"}
        environment.pop("TF_CONFIG", None)
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        self.folder = folder
        self.output = done.stdout
        self.results = json.loads(done.stdout.rpartition("TOLD ")[2])

    def __getitem__(self, scene: str):
        return self.results[scene]

    def records(self, scene: str, kind: str) -> list[dict]:
        return [record for record in journal.read(self.folder / scene) if record["kind"] == kind]

    def metrics(self, scene: str) -> dict[int, dict]:
        return {record["step"]: record["values"] for record in self.records(scene, "metric")}


@pytest.fixture(scope="module")
def legacy(tmp_path_factory):
    if not (importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tf_keras")):
        pytest.skip("TensorFlow: not installed (pip install 'hpcml[tensorflow]')")
    return Told(tmp_path_factory.mktemp("legacy"), LEGACY, "1")


@pytest.fixture(scope="module")
def keras_3(tmp_path_factory):
    if not importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow: not installed (pip install 'hpcml[tensorflow]')")
    return Told(tmp_path_factory.mktemp("keras_3"), KERAS_3, "0")


def test_gpus_that_were_given_but_are_not_seen_are_an_error(legacy):
    error = legacy["no gpu"]["error"]
    assert "CUDA_VISIBLE_DEVICES=-1: TensorFlow sees 0 GPUs, this task was given 2" in error
    assert "tensorflow[and-cuda]" in error
    assert "HPCML_DEVICES=cpu" in error


def test_virtual_devices_are_named_and_may_be_configured_again(legacy):
    assert legacy["names"] == legacy["again"] == ["CPU:0", "CPU:1"]


def test_other_devices_after_tensorflow_started_are_refused(legacy):
    assert "already started" in legacy["too late"]["error"]
    assert "restart the kernel" in legacy["too late"]["error"]


def test_mirrored_trains_on_all_devices_of_the_task(legacy):
    (replicas,) = legacy.records("mirrored", "replicas")
    assert (replicas["in_sync"], replicas["expected"], replicas["virtual"]) == (2, 2, True)
    assert [name.rpartition("device:")[2] for name in replicas["devices"]] == ["CPU:0", "CPU:1"]


def test_a_device_that_is_left_out_ends_the_run_before_the_first_step(legacy):
    error = legacy["one of two"]["error"]
    assert "the model trains on 1 replicas in sync, not on 2" in error
    assert "tf.distribute.MirroredStrategy()" in error
    assert legacy.records("one of two", "replicas")[0]["in_sync"] == 1
    assert legacy.metrics("one of two") == {}


def test_a_task_that_trains_the_whole_job_by_itself_ends(legacy):
    assert "each of the 2 tasks trains the whole job by itself" in legacy["each the whole"]["error"]
    assert legacy.metrics("each the whole") == {}


def test_each_epoch_is_recorded_as_keras_measured_it(legacy):
    metrics, history = legacy.metrics("mirrored"), legacy["mirrored"]["history"]
    assert list(metrics) == [0, 1, 2]
    for epoch in (1, 2):
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert metrics[epoch][name] == pytest.approx(history[name][epoch - 1])
    assert metrics[1]["lr"] == pytest.approx(0.01)


def test_the_speed_that_keras_prints_is_rounded_and_the_recorded_one_is_not(legacy, keras_3):
    for told, scene in ((legacy, "mirrored"), (keras_3, "original")):
        for epoch, shown in enumerate(told[scene]["history"]["samples_per_s"], 1):
            assert shown == pytest.approx(told.metrics(scene)[epoch]["samples_per_s"], rel=1e-3)
            assert shown == float(f"{shown:.4g}") or shown == round(shown)


@pytest.mark.parametrize(
    ("speed", "shown"), [(12345.678, 12346.0), (999.96, 1000.0), (123.456, 123.5), (0.123456, 0.1235), (0.0, 0.0)]
)
def test_a_speed_keeps_the_digits_that_mean_something(speed, shown):
    assert recorder._readable(speed) == shown


def test_speed_follows_from_the_global_batch(legacy):
    for epoch in (1, 2):
        values = legacy.metrics("mirrored")[epoch]
        assert values["samples_per_s"] * values["epoch_time_s"] == pytest.approx(40)  # 5 steps of 8 samples
        assert values["step_time_ms"] * 5 == pytest.approx(1000 * values["epoch_time_s"])


def test_the_time_to_the_first_step_is_recorded_once(legacy):
    records = legacy.records("twice", "metric")
    assert [record["step"] for record in records] == [0, 1, 1]
    assert records[0]["values"]["time_to_first_step_s"] > 0


def test_progress_counts_epochs(legacy):
    progress = legacy.records("mirrored", "progress")
    assert [(p["done"], p["total"], p["unit"]) for p in progress] == [(1, 2, "epoch"), (2, 2, "epoch")]
    assert progress[1]["text"].startswith("epoch 2/2 val_accuracy ")


def test_a_batch_costs_nothing(legacy):
    assert legacy["hooks"]["per batch"] is False
    assert legacy["hooks"]["train_function"] != "first"


def test_the_rate_of_a_schedule_is_recorded(legacy, keras_3):
    for told, scene in ((legacy, "schedule"), (legacy, "old schedule"), (keras_3, "schedule")):
        rates = [values["lr"] for step, values in told.metrics(scene).items() if step]
        assert rates == sorted(rates, reverse=True)
        assert 0 < rates[1] < rates[0] <= 0.5


@pytest.mark.parametrize(
    ("scene", "says"),
    [
        ("original", "1 of 2 virtual CPU devices trains and the rest idle"),
        ("mirrored", "no speed-up"),
        ("alone", "run two tasks (tasks_per_node = 2)"),
    ],
)
def test_what_a_rehearsal_does_not_show_is_said(legacy, scene, says):
    (message,) = legacy.records(scene, "message")
    assert message["level"] == "warning"
    assert says in message["text"]
    assert f"hpcml: {message['text']}" in legacy.output


def test_what_cannot_be_recorded_does_not_end_the_training(legacy):
    assert len(legacy["odd"]["history"]["loss"]) == 2
    assert "not recorded" in legacy.records("odd", "message")[-1]["text"]


def test_keras_3_is_recorded_as_well(keras_3):
    assert keras_3["keras"].startswith("3.")
    (replicas,) = keras_3.records("original", "replicas")
    assert (replicas["in_sync"], replicas["expected"]) == (1, 1)
    values, history = keras_3.metrics("original")[2], keras_3["original"]["history"]
    assert values["val_loss"] == pytest.approx(history["val_loss"][1])
    assert values["samples_per_s"] * values["epoch_time_s"] == pytest.approx(40)
    assert "profiled_steps" not in values
    assert keras_3.metrics("original")[0]["time_to_first_step_s"] > 0


def test_the_precision_is_that_of_the_job(keras_3):
    assert keras_3["policy"] == "mixed_float16"
    assert keras_3.metrics("original")[1]["lr"] == pytest.approx(0.01)
