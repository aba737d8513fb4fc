"""What a Keras training has to remember: weights, optimizer, the random numbers of its layers and of each rank.

Plain arrays of the variables: ``tf.train.Checkpoint`` knows nothing of the generators of Keras 2's random layers, and of
a variable whose replicas differ, as BatchNormalization's means do, it keeps one value for all of them.
TensorFlow is imported inside the functions.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HpcmlError

# In a name, how many such layers or models were built before in the process.
_COUNTS = re.compile(r"_\d+(?=[_:]|$)")
_COMMON, _OWN, _RANDOM = "common.npz", "rank-{}.npz", "random"


@dataclass(frozen=True)
class State:
    """The variables of one training, in an order that each of its executions finds again.

    Attributes:
        common: those that all replicas of all ranks have alike; rank 0 keeps them.
        own: those that each replica may have its own value of: BatchNormalization's means, states of generators; each
            rank keeps its replicas'.
    """

    common: Sequence[Any]
    own: Sequence[Any]

    def looks(self) -> list[str]:
        """Return a line for each variable: the end of its name, type and shape."""
        told = ((_COUNTS.sub("", one.name.rpartition("/")[2]), _parts(one)[0]) for one in (*self.common, *self.own))
        return [f"{name} {part.dtype.name} {tuple(part.shape)}" for name, part in told]

    def write(self, folder: Path, rank: int) -> None:
        """Write this rank's part of a checkpoint.

        Raises:
            OSError: it can't be written.
        """
        if rank == 0:
            np.savez(folder / _COMMON, **{f"v{index}": _array(_parts(one)[0]) for index, one in enumerate(self.common)})
        own = {
            f"v{index}.{replica}": _array(part)
            for index, one in enumerate(self.own)
            for replica, part in enumerate(_parts(one))
        }
        np.savez(folder / _OWN.format(rank), **own, **{_RANDOM: np.array(json.dumps(_random()))})

    def load(self, folder: Path, rank: int) -> str:
        """Load a checkpoint of variables that look the same; returns what could not be as it was, mostly nothing."""
        with np.load(folder / _COMMON) as kept:
            for index, one in enumerate(self.common):
                for part in _parts(one):
                    _assign(part, kept[f"v{index}"])
        file = folder / _OWN.format(rank)
        there = file.exists()
        with np.load(file if there else folder / _OWN.format(0)) as kept:
            for index, one in enumerate(self.own):
                for replica, part in enumerate(_parts(one)):
                    name = f"v{index}.{replica}"
                    there = there and name in kept
                    _assign(part, kept[name if name in kept else f"v{index}.0"])
            if there:
                _set_random(json.loads(str(kept[_RANDOM])))
        return "" if there else "it was saved by another number of replicas: random numbers may differ"


def of(model: Any) -> State:
    """Return the state of a compiled model whose layers are built; builds the optimizer's.

    Raises:
        HpcmlError: the model is not built, so it has no weights yet.
    """
    import tensorflow as tf

    if not model.built:
        fix = "tf.keras.Input(shape) as the model's first layer, or model.build(shape) before model.fit()"
        raise HpcmlError("the model has no weights yet that could be kept", origin="run.callbacks(keep=True)", fix=fix)
    optimizer = model.optimizer
    # The last is that of tf.keras.optimizers.legacy, which otherwise makes its variables in the first step.
    for name in () if _is_built(optimizer) else ("build", "_create_all_weights"):
        if callable(build := getattr(optimizer, name, None)):
            with model.distribute_strategy.scope():
                build(model.trainable_variables)
            break
    metrics = {id(one) for one in getattr(model, "metrics_variables", ())}  # of Keras 3; begun anew with each epoch
    found = [one for one in model.variables if id(one) not in metrics]
    slots = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    # Beside its variables Keras 2 has the learning rate and the scale of the loss.
    hidden = [one for one in tf.train.TrackableView(optimizer).descendants() if isinstance(one, tf.Variable)]
    every = {id(one): one for one in (*found, *slots, *hidden)}
    own = {id(one): one for one in found if not _variable(one).trainable}
    return State([one for key, one in every.items() if key not in own], [*own.values(), *_generators(model)])


def _is_built(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "_built", False) or getattr(optimizer, "built", False))


def unkept(model: Any) -> list[str]:
    """Return the names of layers whose random numbers nobody can keep: they are counted inside a running graph."""
    layers = getattr(model, "submodules", ())
    return [one.name for one in layers if getattr(_dice(one), "_rng_type", "") == "legacy_stateful"]


def _generators(model: Any) -> list[Any]:
    """Return the states of the ``tf.random.Generator`` of Keras 2's random layers, and of a layer's own."""
    import tensorflow as tf

    found = []
    for layer in (model, *getattr(model, "submodules", ())):
        for one in (getattr(_dice(layer), "_generator", None), *vars(layer).values()):
            if isinstance(one, tf.random.Generator):
                found.append(one.state)
    return list({id(one): one for one in found}.values())


def _dice(layer: Any) -> Any:
    return getattr(layer, "_random_generator", None)  # backend.RandomGenerator of tf_keras's BaseRandomLayer


def _variable(one: Any) -> Any:
    """Return TensorFlow's variable; Keras 3 has its own around it."""
    return one if callable(one.value) else one.value


def _parts(one: Any) -> Sequence[Any]:
    """Return the variable of each replica of this process."""
    variable = _variable(one)
    return list(getattr(variable, "values", (variable,)))


def _array(part: Any) -> Any:
    found = part.numpy()
    return found if found.dtype.isbuiltin == 1 else found.view(f"u{found.dtype.itemsize}")  # such as bfloat16


def _assign(part: Any, kept: Any) -> None:
    part.assign(kept if part.dtype.as_numpy_dtype == kept.dtype else kept.view(part.dtype.as_numpy_dtype))


def _random() -> Mapping[str, Any]:
    """Where this process's random numbers are, of Python and NumPy."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def _set_random(kept: Mapping[str, Any]) -> None:
    version, keys, gauss = kept["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = kept["numpy"]
    np.random.set_state((kind, np.array(numbers, np.uint32), *rest))


def difference(kept: Iterable[str], here: Iterable[str]) -> str:
    """Return where two looks differ first, for a person; empty where they don't."""
    import itertools

    for old, new in itertools.zip_longest(kept, here, fillvalue="nothing"):
        if old != new:
            return f"{old} is kept, {new} is here"
    return ""
