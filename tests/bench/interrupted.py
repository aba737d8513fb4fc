"""The trainings that ``bench resume`` interrupts: a notebook's each, which logs its steps and leaves its weights."""

import importlib.util
from dataclasses import dataclass

from bench import by_hand

EPOCHS, STEPS = 4, 15  # of the notebooks' data and batch
SCRIPT, WEIGHTS = "train.py", "weights.npz"

_TORCH_STEP = """\
        run.log(step=int(optimizer.state[next(network.parameters())]["step"]), trained=1)
        time.sleep(float(os.environ["BENCH_PACE"]))
"""
_TORCH_WEIGHTS = """
import numpy

if rank == 0:
    numpy.savez(run.dir.path / "weights.npz", *[part.detach().numpy() for part in network.parameters()])
dist.destroy_process_group()
"""
_KERAS_STEP = """\
import os
import time


class Steps(tf.keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        run.log(step=int(self.model.optimizer.iterations.numpy()), trained=1)
        time.sleep(float(os.environ["BENCH_PACE"]))


"""
_KERAS_WEIGHTS = """
import numpy

if run.topology.rank == 0:
    numpy.savez(run.dir.path / "weights.npz", *model.get_weights())
"""
TORCH: by_hand.Changes = (
    (r"^epochs = \d+", f"epochs = {EPOCHS}"),
    (r"^import torch\n", "import os\nimport time\n\nimport torch\n"),
    (r"(^        optimizer\.step\(\).*\n)", rf"\1{_TORCH_STEP}"),
)
KERAS: by_hand.Changes = (
    (r"^epochs = \d+", f"epochs = {EPOCHS}"),
    (r"^import tensorflow as tf\n", "import tensorflow as tf\n\ntf.config.experimental.enable_op_determinism()\n"),
    (r"(?=^model\.fit\()", _KERAS_STEP),
    (r"callbacks=(run\.callbacks\([^()]*\))", r"callbacks=[*\1, Steps()]"),
)


@dataclass(frozen=True)
class Case:
    """A training that survives.

    Attributes:
        keeps: what its notebook has where it keeps checkpoints.
        tolerance: the largest difference of any weight from the uninterrupted run's; 0: the same bits.
    """

    name: str
    notebook: str
    devices: int
    ranks: int
    changes: by_hand.Changes
    weights: str
    keeps: str
    tolerance: float
    needs: tuple[str, ...]


ALL = (
    Case("ddp", "simple2GPUsDDP", 2, 2, TORCH, _TORCH_WEIGHTS, "keep=[", 0.0, ("torch",)),
    Case("original", "simple2GPUsOrig", 0, 1, KERAS, _KERAS_WEIGHTS, "keep=True", 1e-5, ("tensorflow",)),
    Case("mirrored", "simple2GPUsSol", 2, 1, KERAS, _KERAS_WEIGHTS, "keep=True", 1e-5, ("tensorflow",)),
    Case("multiworker", "simple2GPUsSol2", 2, 2, KERAS, _KERAS_WEIGHTS, "keep=True", 1e-5, ("tensorflow", "tf_keras")),
)


def script(case: Case) -> str:
    """Return the training of a case's notebook, which logs its steps and leaves its weights.

    Raises:
        ValueError: the notebook no longer has what this changes.
    """
    text, _, _ = notebook(case).partition("# %% [markdown]\n# ## Result\n")
    return by_hand.changed(text, case.changes) + case.weights + "run.finish()\n"


def notebook(case: Case) -> str:
    """Return the text of a case's notebook."""
    return (by_hand.NOTEBOOKS / f"{case.notebook}.py").read_text(encoding="utf-8")


def missing(case: Case) -> str:
    """Return why a case can't be measured here; empty where it can."""
    if lacking := [name for name in case.needs if importlib.util.find_spec(name) is None]:
        return f"{case.name} is left out: no {' and no '.join(lacking)} here."
    return "" if case.keeps in notebook(case) else f"{case.name} is left out: {case.notebook}.py keeps no checkpoints."
