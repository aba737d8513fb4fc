"""A notebook's training as two scripts that are the same but for hpcml: one under it, one as written and started by hand.

Both are made of the notebook's text up to its results, by replacements, and carry the same clock (clock.py). The one by
hand never imports hpcml: it sets devices itself, reads the data from a file, and leaves out what hpcml does beside the
training. Whatever the notebooks get that is hpcml's own must be known here, or making the scripts fails.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from bench import clock

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "notebooks"
DATA = "data.npz"  # of the script by hand, beside it
LOAD = f"""\
import numpy as np


def load():
    with np.load("{DATA}") as file:
        return (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])


"""
_DEVICES = """\
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * {count})
"""
# What hpcml.begin() does for torch; both sides have these threads in their environment.
_TORCH = """\
import os

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.set_num_interop_threads(int(os.environ["TF_NUM_INTEROP_THREADS"]))
device = torch.device("cpu")
"""
_EVALUATED = "    (loss, accuracy), (val_loss, val_accuracy) = means(sums), evaluate()\n"
_EVALUATED_ASIDE = """\
    trained = means(sums)
    spans.end(len(train) * global_batch)
    (loss, accuracy), (val_loss, val_accuracy) = trained, evaluate()
    spans.begin()
"""
_LAST = """\
    if spans.last():
        break

"""
Changes = Sequence[tuple[str, str]]  # patterns, each found once, and what comes for them


def _literal(text: str) -> str:
    """Return a text that stands for itself in a replacement."""
    return text.replace("\\", r"\\")


# In both scripts: train until told to stop, and report the spans.
_KERAS_CLOCK: Changes = (
    (r"^epochs = \d+", "epochs = 100_000"),
    (r"(?=^model\.fit\()", _literal(clock.KERAS)),
    (r"callbacks=(run\.callbacks\([^()]*\))", r"callbacks=[*\1, Clock()]"),
    (r"^history = run\.history\b(.|\n)*", ""),
)
_TORCH_CLOCK: Changes = (
    (r"^epochs = \d+", "epochs = 100_000"),
    (r"(?=^for epoch in run\.epochs\()", _literal(f"{clock.SPANS}spans = Spans(rank)\n")),
    (re.escape(_EVALUATED), _EVALUATED_ASIDE),
    (r'(^    print\(f"epoch \{epoch\}/\{epochs\}: ".*\n)(.|\n)*', rf"\1{_LAST}"),
)
# By hand alone: nothing of hpcml is left.
_KERAS_BY_HAND: Changes = (
    (r"^import hpcml\n", LOAD),
    (r"^run = hpcml\.begin\(.*\)\n", ""),
    (r"hpcml\.data\.load\(data, seed\)", "load()"),
    (r"\brun\.tuned\(", "dict("),
    (r"\*run\.callbacks\([^()]*\), ", ""),
)
_TORCH_BY_HAND: Changes = (
    (r"^import hpcml\n", LOAD),
    (r"^run = hpcml\.begin\(.*\)\n", ""),
    (r"^import torch\n", _TORCH),
    (r"hpcml\.data\.load\(data, seed\)", "load()"),
    (r"\brun\.tuned\(", "dict("),
    (r"\brun\.epochs\(epochs, model[^()]*\)", "range(1, epochs + 1)"),
    (r"\brun\.steps\((\w+)\)", r"\1"),
    (r"^    run\.log\(.*\)\n", ""),
)


def write_data(folder: Path) -> None:
    """Write the data set that a script by hand reads."""
    import numpy as np

    from hpcml import data

    (x_train, y_train), (x_test, y_test) = data.load("mnist", 123)
    np.savez(folder / DATA, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def script(notebook: str, *, bare: bool, devices: int = 1, keep: bool = True) -> str:
    """Return the training of a notebook in percent format as a script.

    Args:
        notebook: its text.
        bare: by hand; else under hpcml.
        devices: virtual CPU devices of a TensorFlow process.
        keep: under hpcml: save checkpoints as the notebook does; by hand there are none.

    Raises:
        ValueError: the notebook has no longer what this changes, or has more of hpcml than this knows.
    """
    text, _, _ = notebook.partition("# %% [markdown]\n# ## Result\n")
    torch = "\nimport torch\n" in text
    if torch:
        leave = "hvd.shutdown()\n" if "horovod.torch" in text else "dist.destroy_process_group()\n"
        text = changed(text, _TORCH_CLOCK) + leave
    else:
        text = changed(text, _KERAS_CLOCK)
    if not bare:
        return (text if keep else re.sub(r", keep=(True|\[\w+\])\)", ")", text)) + "run.finish()\n"
    text = changed(text, _TORCH_BY_HAND if torch else _KERAS_BY_HAND)
    # What is there several times.
    text = re.sub(r"^print\(.*hpcml\.data\.fingerprint\(.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\brun\.device\b", "device", text)
    text = re.sub(r"\brun\.epochs_done\b", "0", text)
    if not torch and devices > 1:
        text = changed(text, [(r"^import tensorflow as tf\n", _DEVICES.format(count=devices))])
    left = [line for line in text.splitlines() if re.search(r"\bhpcml\b|\brun\b", line.partition("#")[0])]
    if left:
        raise ValueError(f"the script by hand still has hpcml: adapt {Path(__file__).name}\n" + "\n".join(left))
    return text


def changed(text: str, changes: Changes) -> str:
    """Return a text with some patterns replaced.

    Raises:
        ValueError: one is not found once.
    """
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{count} times {pattern!r} in the notebook, 1 is wanted: adapt {Path(__file__).name}")
    return text
