"""A small Keras training on several workers that a test can stop where it likes, and the job that runs it."""

from __future__ import annotations

import re

from hpcml.rundir import RunDir

# In the epoch that HOLDS names for this restart it waits until it is asked to stop, or killed.
TRAIN = """
import hashlib, os, random, time
import hpcml

run = hpcml.begin(strategy="multiworker")
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
tf.keras.utils.set_random_seed(3)
random.seed(run.topology.rank)
tf.config.experimental.enable_op_determinism()
x = tf.reshape(tf.range(512.0), (-1, 4)) / 512
data = tf.data.Dataset.from_tensor_slices((x, tf.reduce_sum(x, 1, keepdims=True)))
epochs, steps = 5, 8


def shuffled(epoch):
    return data.shuffle(128, seed=epoch, reshuffle_each_iteration=False).batch(16)


options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
train = tf.data.Dataset.range(run.epochs_done, epochs).flat_map(shuffled).with_options(options)
with strategy.scope():
    model = tf.keras.Sequential([
        tf.keras.Input((4,)), tf.keras.layers.Dense(16), tf.keras.layers.BatchNormalization(),
        tf.keras.layers.Dropout(0.3), tf.keras.layers.Dense(1),
    ])
    model.compile(tf.keras.optimizers.AdamW(0.01), "mse")
holds = {int(pair.split(":")[0]): int(pair.split(":")[1]) for pair in os.environ.get("HOLDS", "").split(",") if pair}
place = f"{run.topology.rank}.{run.restart}"
(run.dir.path / f"pid.{place}").write_text(str(os.getpid()))


class Held(tf.keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if holds.get(run.restart) == epoch + 1:
            (run.dir.path / f"holding.{place}").touch()
            while not run.dir.stop.exists():
                time.sleep(0.05)

    def on_epoch_end(self, epoch, logs=None):
        random.random()
        self.model.optimizer.learning_rate.assign(self.model.optimizer.learning_rate * 0.9)


model.fit(train, epochs=epochs, initial_epoch=run.epochs_done, steps_per_epoch=steps, verbose=0,
          callbacks=[*run.callbacks(global_batch=16, keep=True), Held()])
values = b"".join(weight.numpy().tobytes() for weight in model.weights)
print(f"WEIGHTS {hashlib.sha256(values).hexdigest()} after step {model.optimizer.iterations.numpy()}, "
      f"{random.random()}, {len(run.history['loss'])} epochs", flush=True)
run.finish()
"""
JOB = """
script = "train.py"
name = "train"
strategy = "{strategy}"
[resources]
gpus_per_node = 2
tasks_per_node = 2
cpus_per_task = 1
time = "{time}"
[slurm]
max_requeues = {requeues}
[env]
vars = {{HOLDS = "{holds}", MLFLOW_TRACKING_URI = "http://127.0.0.1:9"}}
"""


def with_horovod() -> str:
    """The same training with Horovod: each rank has its part of every batch, and its own moving means."""
    changes = {
        'strategy="multiworker"': 'strategy="horovod"',
        "strategy = tf.distribute.MultiWorkerMirroredStrategy()": "import horovod.tensorflow.keras as hvd\n\nhvd.init()\n"
        "strategy = tf.distribute.get_strategy()",
        "batch(16)": "shard(hvd.size(), hvd.rank()).batch(8)",
        'tf.keras.optimizers.AdamW(0.01), "mse"': 'hvd.DistributedOptimizer(tf.keras.optimizers.AdamW(0.01)), "mse"',
        "Held()]": "hvd.callbacks.BroadcastGlobalVariablesCallback(0), Held()]",
        "in model.weights": "in model.trainable_weights",
    }
    text = TRAIN
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def weights(run: RunDir) -> list[str]:
    """Return the last line of each rank: what its training came to."""
    return [re.findall("^WEIGHTS .*$", run.log(rank).read_text(), re.M)[-1] for rank in (0, 1)]
