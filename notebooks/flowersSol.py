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
# # Flowers on two GPUs, with MirroredStrategy
#
# Transfer learning: ResNet50 has learned from ImageNet what is in pictures and stays as it is; two new layers learn the
# five kinds of flowers. Three notebooks train in the same way and differ in this title and in the section "Strategy",
# nowhere else. The same file runs at every scale:
#
#     ipython flowersSol.py                    # in notebooks/: on a laptop, or in an allocation's shell
#     hpcml run jobs/flowers_mirrored.toml     # on a laptop, or inside an allocation
#     sbatch jobs/flowers_mirrored.sbatch      # queued: one node, two GPUs
#     hpcml compare jobs/flowers_original.toml jobs/flowers_mirrored.toml jobs/flowers_multiworker.toml
#
# Images and weights lie in the data folder, `$HPCML_DATA` or the site's. Nothing is downloaded here, because compute
# nodes have no network: where the images are missing, the error says how to get them.

# %% tags=["parameters"]
data = "flowers"  # a folder with one folder for each class, below the data folder; or a path to one
weights = "imagenet"  # published ones, below the data folder; or random, or a path to an .h5
image_size = 180  # pixels, height and width; 32 at least
global_batch = 128  # images a step, over all replicas together: more GPUs must not change what is learned
epochs = 10  # passes over the training images
lr = 1e-3  # Adam's learning rate; it goes with the global batch, so it stays as the number of GPUs changes
seed = 123  # of split, weights and order: the runs start equal and see equal batches

# %% [markdown]
# ## Strategy
#
# One process drives all GPUs of one node. Each holds a copy of the model (a replica), takes its part of every global
# batch, and the gradients are summed before each step.
#
# `begin` comes first because threads, devices and the Keras flavour can't be changed once TensorFlow is imported.

# %%
import hpcml

run = hpcml.begin(strategy="mirrored")

import tensorflow as tf

strategy = tf.distribute.MirroredStrategy()  # all devices of this process
print(f"replicas in sync: {strategy.num_replicas_in_sync}")

# %% [markdown]
# ## Data
#
# Every run sees the same batches in the same order, whatever the number of processes: each reads and decodes only its own
# part of every batch. Of each class four fifths are to train on and the rest to test.
#
# The folder may be one of single images, or what `hpcml data pack` makes of it: on a parallel file system, where opening a
# file takes milliseconds, that is read many times faster. The batches are the same.

# %%
images = hpcml.data.open(data)  # single images are all read and checked once, none is decoded
parts = images.split(seed)


def decode(content):
    """Return a file's content as an image (image_size, image_size, 3); whole numbers take a quarter of float32's memory."""
    image = tf.image.resize(tf.io.decode_jpeg(content, channels=3), (image_size, image_size))
    return tf.cast(tf.round(image), tf.uint8)


# What `hpcml tune` searches over, with the values that hold while the job has no [tuning]: batches made ready ahead, threads
# that only the input has (0: it shares TensorFlow's), steps in one call of the graph, XLA (None: Keras decides).
tuned = run.tuned(prefetch=tf.data.AUTOTUNE, data_threads=0, steps_per_execution=1, jit_compile=None)

# The order of an epoch follows from seed and number, so a run goes on after a restart as if nothing had been. A remainder
# would be a smaller batch, with noisier gradients and a graph of its own; other images are left out each time. The test
# images are decoded once and kept: 70 MB in all for 734 of 180 × 180.
mine = {"decode": decode, "rank": run.topology.rank, "world": run.topology.world}
epochs_left = range(run.epochs_done, epochs)
train = parts.train.tensorflow(global_batch, seed=seed, epochs=epochs_left, prefetch=tuned["prefetch"], **mine)
test = parts.test.tensorflow(global_batch, **mine).cache()
if tuned["data_threads"]:
    options = tf.data.Options()
    options.threading.private_threadpool_size = tuned["data_threads"]
    train, test = train.with_options(options), test.with_options(options)
steps = len(parts.train) // global_batch  # an epoch

print(f"{len(parts.train)} + {len(parts.test)} images of {', '.join(images.classes)}")
print(f"{steps} steps an epoch, data {parts.fingerprint}")

# %% [markdown]
# ## Model
#
# `preprocess_input` gives ResNet50 what it was trained on: blue, green, red, each without ImageNet's mean. It is part of
# the model, so the GPU does it, and who loads the model can't forget it.
#
# The same weights for every run: those of the file, and for the new layers what the seed gives. The fingerprints printed
# here are the same in the three notebooks. What is built in the strategy's scope is copied to each replica.

# %%
weights_file = hpcml.data.images.pretrained(weights)  # None: there is none, a warning has said so, and they are random

tf.keras.utils.set_random_seed(seed)
with strategy.scope():
    base = tf.keras.applications.ResNet50(
        include_top=False, weights=weights_file, input_shape=(image_size, image_size, 3), pooling="avg"
    )
    base.trainable = False  # only the two layers after it learn; its BatchNorm keeps the means that came with it

    inputs = tf.keras.Input((image_size, image_size, 3))  # 0…255
    x = tf.keras.applications.resnet50.preprocess_input(inputs)
    x = base(x, training=False)  # 2048
    x = tf.keras.layers.Dense(512, activation="relu")(x)
    outputs = tf.keras.layers.Dense(len(images.classes), dtype="float32")(x)  # logits; float32 in mixed precision too
    model = tf.keras.Model(inputs, outputs)
    model.compile(
        optimizer=tf.keras.optimizers.Adam(lr),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=tuned["steps_per_execution"],
        jit_compile=tuned["jit_compile"],
    )

print(f"ResNet50 {weights_file or 'with random weights'}, {hpcml.data.fingerprint(base.get_weights())}")
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
