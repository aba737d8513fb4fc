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
# # Retraining, train: arrays → model
#
# A small convolutional network, trained anew from random weights.
#
#     hpcml run jobs/retrain.toml --from train
#
# Seen on 2 cores without a GPU: validation accuracy 0.93 after 5 epochs, in 10 seconds, most of them TensorFlow's import.

# %% tags=["parameters"]
val_share = 0.2  # of the images to train on
global_batch = 64  # images a step, over all replicas
epochs = 5
lr = 3e-3  # AdamW's
seed = 12  # of validation part, weights and order

# %%
import hpcml

run = hpcml.begin(strategy="original")
run.journal.write("tags", values={"Phase": "Retraining"})

import numpy as np
import tensorflow as tf

# %%
with np.load(run.step("prepare").path / "prepared" / "train.npz") as arrays:
    x, y = arrays["x"], arrays["y"]
x = x[..., None].astype(np.float32) / 255  # (n, 28, 28, 1) in 0…1

order = np.random.default_rng(seed).permutation(len(x))
cut = round(len(x) * val_share)
val, train = order[:cut], order[cut:]

assert cut > 0 and len(train) >= global_batch, f"{len(train)} images of {len(x)} are too few for one batch"
print(f"{len(train):,} images to train on, {len(val):,} to validate with")


# %%
def shuffled(epoch):
    """The order follows from the epoch, so that a training that goes on from a checkpoint sees the same batches."""
    return images.shuffle(len(train), seed=seed + epoch, reshuffle_each_iteration=False).batch(
        global_batch, drop_remainder=True
    )


images = tf.data.Dataset.from_tensor_slices((x[train], y[train]))
batches = tf.data.Dataset.range(run.epochs_done, epochs).flat_map(shuffled).prefetch(tf.data.AUTOTUNE)

tf.keras.utils.set_random_seed(seed)
model = tf.keras.Sequential(
    [
        tf.keras.Input((28, 28, 1)),
        tf.keras.layers.Conv2D(32, 5, padding="same"),
        tf.keras.layers.MaxPooling2D(),  # 14, 14, 32
        tf.keras.layers.LeakyReLU(),  # after pooling: the same values as before it, for a quarter of the work
        tf.keras.layers.Conv2D(4, 5, padding="same"),
        tf.keras.layers.LeakyReLU(),
        tf.keras.layers.Flatten(),  # 784
        tf.keras.layers.Dense(int(y.max()) + 1),  # logits
    ]
)
model.compile(
    optimizer=tf.keras.optimizers.AdamW(lr),
    loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

# %%
model.fit(
    batches,
    validation_data=(x[val], y[val]),
    epochs=epochs,
    initial_epoch=run.epochs_done,
    steps_per_epoch=len(train) // global_batch,
    verbose=2,
    callbacks=run.callbacks(global_batch=global_batch, keep=True),
)

# %%
assert run.log_model(model, example=x[:5]), "without a model there is nothing to evaluate"
run.finish()
