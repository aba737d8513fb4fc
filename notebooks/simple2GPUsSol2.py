# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MNIST on two GPUs, with MultiWorkerMirroredStrategy
#
# A small convolutional network, trained in the same way by three notebooks that differ in this title and in the section
# "Strategy", nowhere else. The same file runs at every scale:
#
#     ipython simple2GPUsSol2.py              # in notebooks/: on a laptop, or in an allocation's shell
#     hpcml run jobs/mnist_multiworker.toml   # on a laptop, or inside an allocation
#     sbatch jobs/mnist_multiworker.sbatch    # queued: one node, two GPUs
#     hpcml compare jobs/mnist_original.toml jobs/mnist_mirrored.toml jobs/mnist_multiworker.toml
#
# Seen on 2 cores without a GPU: accuracy 0.918 or 0.919 with each strategy, in less than a minute.

# %% tags=["parameters"]
data = "mnist"  # 5,000 real digits, offline; or a path to an .npz with x_train, y_train, x_test, y_test
global_batch = 256  # images a step, over all replicas together: more GPUs must not change what is learned
epochs = 5  # passes over the training images
lr = 3e-3  # AdamW's learning rate; it goes with the global batch, so it stays as the number of GPUs changes
seed = 123  # of split, weights and order: the runs start equal and see equal batches

# %% [markdown]
# ## Strategy
#
# One process for each task, on one node or on many; `begin` has told each, in `TF_CONFIG`, where the others are.
# A single process needs no `TF_CONFIG` and takes its own GPUs, as MirroredStrategy does.
#
# `begin` comes first because threads, devices and the Keras flavour can't be changed once TensorFlow is imported.

# %%
import hpcml

run = hpcml.begin(strategy="multiworker")

import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()  # all devices of all tasks
print(f"replicas in sync: {strategy.num_replicas_in_sync}")

# %% [markdown]
# ## Data
#
# Every run sees the same batches in the same order. Each process builds the whole pipeline; TensorFlow then cuts every
# global batch into equal parts, one for each replica.

# %%
(x_train, y_train), (x_test, y_test) = hpcml.data.load(data, seed)  # x (n, 28, 28, 1) in 0…1, y (n,)

# What `hpcml tune` searches over, with the values that hold while the job has no [tuning]: batches made ready ahead, threads
# that only the input has (0: it shares TensorFlow's), steps in one call of the graph, XLA (None: Keras decides).
tuned = run.tuned(prefetch=tf.data.AUTOTUNE, data_threads=0, steps_per_execution=1, jit_compile=None)

# Several processes: each takes its part of every batch. The default, AUTO, would first look for files to hand out whole.
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
# The autotuner of each epoch's iterator wakes after 20, 40, 80, … 640 ms, and the end of the epoch waits for its next time.
# An epoch here is about that short, and there is nothing to tune.
options.autotune.enabled = False
if tuned["data_threads"]:
    options.threading.private_threadpool_size = tuned["data_threads"]

# A remainder would be a smaller batch, with noisier gradients and a graph of its own; other images are left out each time.
# There is no cache(): the arrays lie in memory already.
images = tf.data.Dataset.from_tensor_slices((x_train, y_train))
steps = len(x_train) // global_batch  # an epoch


def shuffled(epoch):
    """The same order in every process: else the parts of a batch would overlap. And after a restart: the epoch gives it."""
    order = images.shuffle(len(x_train), seed=seed + epoch, reshuffle_each_iteration=False)
    return order.batch(global_batch, drop_remainder=True)


train = tf.data.Dataset.range(run.epochs_done, epochs).flat_map(shuffled)  # of the epochs that are left
train = train.prefetch(tuned["prefetch"]).with_options(options)
test = tf.data.Dataset.from_tensor_slices((x_test, y_test)).batch(global_batch).with_options(options)

assert steps > 0, f"global_batch = {global_batch} is more than the {len(x_train)} training images"
print(f"{steps} steps an epoch, data {hpcml.data.fingerprint([x_train, y_train, x_test, y_test])}")

# %% [markdown]
# ## Model
#
# The same seed gives the same weights, so every run starts from the same point: the fingerprint printed here is the same
# in the three notebooks. What is built in the strategy's scope is copied to each replica.

# %%
tf.keras.utils.set_random_seed(seed)
with strategy.scope():
    model = tf.keras.Sequential(
        [
            tf.keras.Input(x_train.shape[1:]),  # 28, 28, 1
            tf.keras.layers.Conv2D(32, 5),  # 24, 24, 32
            tf.keras.layers.MaxPooling2D(),  # 12, 12, 32
            tf.keras.layers.LeakyReLU(),  # after pooling: the same values as before it, for a quarter of the work
            tf.keras.layers.Conv2D(4, 5),  # 8, 8, 4
            tf.keras.layers.Flatten(),  # 256
            tf.keras.layers.LeakyReLU(),
            tf.keras.layers.Dense(10, dtype="float32"),  # logits; float32 also where the rest is in mixed precision
        ]
    )
    model.compile(
        optimizer=tf.keras.optimizers.AdamW(lr),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=tuned["steps_per_execution"],
        jit_compile=tuned["jit_compile"],
    )

print(f"{model.count_params():,} weights, {hpcml.data.fingerprint(model.get_weights())}")

# %% [markdown]
# ## Training
#
# `run.callbacks` ends the run before its first step if other replicas train than the strategy should have here. It
# records loss, accuracy and speed of each epoch, and adds nothing to a step. With `keep` the training survives: between
# epochs it saves checkpoints, also when it is asked to stop, and a run that is queued again goes on with the next epoch.

# %%
model.fit(
    train,
    validation_data=test,
    epochs=epochs,
    initial_epoch=run.epochs_done,  # 0, or what a checkpoint has
    steps_per_epoch=steps,
    verbose=2,
    callbacks=run.callbacks(global_batch=global_batch, keep=True),
)
history = run.history  # of all epochs, those before a restart too

assert history["loss"][-1] <= history["loss"][0], "the loss has not gone down"

# %% [markdown]
# ## Result
#
# Strategies may differ in speed, not in accuracy. The first epoch builds the graph, so it doesn't count for speed.

# %%
result = model.evaluate(test, verbose=0, return_dict=True)
speeds = sorted(history["samples_per_s"][1:] or history["samples_per_s"])

assert abs(result["accuracy"] - history["val_accuracy"][-1]) < 0.005, "evaluated on other images than in training"
print(
    f"accuracy {result['accuracy']:.3f}, {speeds[len(speeds) // 2]:,.0f} images/s, "
    f"replicas in sync: {strategy.num_replicas_in_sync}"
)
run.finish()
