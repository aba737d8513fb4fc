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
# # Retraining, prepare: files → arrays
#
# Reads every image once, and parts what is trained on from what is tested with.
#
#     hpcml run jobs/retrain.toml --step prepare
#
# Seen on 2 cores: 5,000 images in 2 seconds.

# %% tags=["parameters"]
data = "digits"  # a folder CLASS/*.png below the data folder, packed or not; the classes may lie in train/
test_share = 0.2  # of all images

# %%
import io

import hpcml

run = hpcml.begin()

import numpy as np
from PIL import Image

folder = hpcml.data.images.find(data)
digits = hpcml.data.open(str(folder / "train" if (folder / "train").is_dir() else folder))
print(digits)

# %% [markdown]
# ## Images
#
# Grey, 28 × 28, as they are: no file is opened again after this step.

# %%
rows = np.arange(len(digits))
contents = digits.read(rows)
x = np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("L").resize((28, 28))) for content in contents])
y = digits.labels.astype(np.int64)

print(f"x {x.shape} {x.dtype}, {len(digits.classes)} classes")

# %% [markdown]
# ## Test set
#
# An image belongs to the test set by its own contents, not by a draw: in a later version of the data, with more images, it
# is on the same side. So no model was ever trained on what another is tested with, and the promoted one meets the new one
# on equal terms.

# %%
import hashlib

first = np.array([int.from_bytes(hashlib.sha256(content).digest()[:4], "big") for content in contents])
is_test = first < test_share * 2**32

assert 0 < is_test.sum() < len(x), f"test_share = {test_share} leaves one side empty"
print(f"{(~is_test).sum():,} images to train on, {is_test.sum():,} to test with")

# %%
prepared = run.dir.path / "prepared"
prepared.mkdir(exist_ok=True)
np.savez(prepared / "train.npz", x=x[~is_test], y=y[~is_test])
np.savez(prepared / "test.npz", x=x[is_test], y=y[is_test])

run.log(0, train_images=int((~is_test).sum()), test_images=int(is_test.sum()))
run.finish()
