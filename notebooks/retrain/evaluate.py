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
# # Retraining, evaluate: the new model and the promoted one, on the same images
#
# Both are loaded from their folders and asked in the same way, so that nothing but the model differs.
#
#     hpcml run jobs/retrain.toml --from evaluate
#
# Seen on 2 cores without a GPU: 1,000 images by two models in 15 seconds, most of them imports.

# %%
import json

import hpcml

run = hpcml.begin()

import numpy as np

from hpcml.tracking import models

# %%
with np.load(run.step("prepare").path / "prepared" / "test.npz") as arrays:
    x, y = arrays["x"], arrays["y"]
test_data = hpcml.data.fingerprint([x, y])  # two results are compared only where this is the same
x = x[..., None].astype(np.float32) / 255  # as in training

print(f"{len(x):,} images to test with, {test_data}")


# %%
def evaluated(folder):
    """Accuracy, and cross entropy of the logits, of the model in a folder."""
    logits = np.asarray(models.load(folder).predict(x), np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    return {"accuracy": float((logits.argmax(axis=1) == y).mean()), "loss": float(loss.mean())}


new = evaluated(run.step("train").model)
print("new     ", new)

# %% [markdown]
# The promoted model was brought by the step `fetch`; before the first promotion there is none.

# %%
folder = run.step("fetch").path / "promoted"
promoted = evaluated(folder) if folder.is_dir() else None
print("promoted", promoted)

# %% [markdown]
# ## Result
#
# What the step `register` decides by.

# %%
run.log(0, test_accuracy=new["accuracy"], test_loss=new["loss"])
if promoted:
    run.log(0, promoted_accuracy=promoted["accuracy"], promoted_loss=promoted["loss"])

run.dir.artifacts.mkdir(exist_ok=True)
result = {"test_data": test_data, "images": len(x), **new, "promoted": promoted}
(run.dir.artifacts / "evaluation.json").write_text(json.dumps(result))
run.finish()
