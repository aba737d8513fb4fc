"""A trained model as an MLflow model folder: saved by the work into the run directory, loaded again by anybody.

Saving needs no network: the folder ``<run>/model`` is delivered like the run's other files. Framework and MLflow are
imported inside the functions.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from ..rundir import RunDir, write_bytes
from . import installed, store

if TYPE_CHECKING:
    from .journal import Journal

DESCRIPTION = "MLmodel"
RUN_KEY = "hpcml.run"
# Rows of the example that are kept, and that tell the signature.
EXAMPLE_ROWS = 5
# MLflow's flavour of a model by the package that its class, or one that it derives from, comes from.
FLAVOURS = {
    "tf_keras": "tensorflow",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "torch": "pytorch",
    "sklearn": "sklearn",
    "xgboost": "xgboost",
    "lightgbm": "lightgbm",
    "mlflow": "pyfunc",
}
# These compute in 32 bits; a signature of 64 would refuse what they take.
KERAS = ("tensorflow", "keras")
NETWORKS = (*KERAS, "pytorch")
# What loading needs besides MLflow; versions are those of the environment.
REQUIREMENTS = {
    "tensorflow": ("tensorflow", "tf-keras", "numpy"),
    "keras": ("keras", "tensorflow", "numpy"),
    "pytorch": ("torch", "numpy"),
    "sklearn": ("scikit-learn", "numpy", "pandas"),
    "pyfunc": ("numpy", "pandas", "cloudpickle"),
}


def log(
    run: RunDir, journal: "Journal", rank: int, model: Any, example: Any = None, flavour: str | None = None
) -> bool:
    """Save a model and say so in the journal; a failure is a warning there, since it must not end a training.

    Returns:
        Whether the model is saved.
    """
    try:
        place = save(run, model, example, flavour, rank=rank)
    except Exception as error:
        text = (
            f"the model is not saved: {error if isinstance(error, HpcmlError) else f'{type(error).__name__}: {error}'}"
        )
        journal.message("warning", text)
        print(f"hpcml: warning: {text}", file=sys.stderr, flush=True)
        return False
    if place:
        journal.message("info", f"model saved: {place.relative_to(run.path)}")
    return True


def save(run: RunDir, model: Any, example: Any = None, flavour: str | None = None, *, rank: int = 0) -> Path | None:
    """Save a model as ``<run>/model`` with signature, input example and pinned requirements; replaces an earlier one.

    All ranks of a distributed training call it: reading variables that the replicas keep apart (moving averages of a
    batch normalisation) is a collective operation (TensorFlow's guide "Multi-worker training with Keras", "Model saving
    and loading"). Only rank 0 writes the folder.

    Args:
        model: of Keras (tf-keras or 3), ``tf.Module``, torch, scikit-learn, or a ``mlflow.pyfunc.PythonModel``.
        example: some rows of input, shape ``(rows, …)``: an array, a dict of them, or a data frame. It gives the signature.
        flavour: the MLflow flavour to save with; by default the model's framework's.
        rank: this process's.

    Returns:
        The folder; None on other ranks than 0.

    Raises:
        HpcmlError: MLflow is missing, or no flavour fits.
        Exception: whatever framework and MLflow raise.
    """
    flavour = flavour or flavour_of(model)
    example = _rows(example, single=flavour in NETWORKS)
    if flavour == "pytorch":
        model = _plain_torch(model)
    outputs = None if example is None else _outputs(flavour, model, example)
    if rank:
        if flavour in KERAS and hasattr(model, "save"):
            with tempfile.TemporaryDirectory(prefix="hpcml-") as scratch:
                model.save(f"{scratch}/model.keras")  # takes part in what rank 0's save reads
        return None
    target = run.model
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)  # mlflow.keras writes the example before it makes the folder (mlflow 3.17)
    try:
        with quietly():
            _save(flavour, model, example, outputs, part, run)
        _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def flavour_of(model: Any) -> str:
    """Return the MLflow flavour for a model.

    Raises:
        HpcmlError: nothing is known of its framework.
    """
    for kind in type(model).__mro__:
        if found := FLAVOURS.get(kind.__module__.partition(".")[0]):
            return found
    raise HpcmlError(
        f"a {type(model).__module__}.{type(model).__qualname__} is no model that is known",
        allowed="models of Keras, TensorFlow, torch, scikit-learn; a mlflow.pyfunc.PythonModel",
        fix="name its MLflow flavour: run.log_model(model, example, flavor=…), or wrap it in a PythonModel",
    )


def load(folder: Path) -> Any:
    """Load a model folder as MLflow's generic model (``predict``, ``metadata``).

    Raises:
        HpcmlError: it is no model folder, or a package that it needs is missing.
    """
    if not (folder / DESCRIPTION).is_file():
        raise HpcmlError(f"{folder} holds no model: there is no {DESCRIPTION}", fix="hpcml model list")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with quietly():
            import mlflow.pyfunc

            return mlflow.pyfunc.load_model(str(folder))
    except ImportError as error:
        fix = f"use the environment that it was trained in, or: pip install -r {folder}/requirements.txt"
        raise HpcmlError(f"the model needs a package: {error}", fix=fix) from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep MLflow from telemetry, progress bars, asking package indexes, and its warnings, meanwhile."""
    settings = {**store.QUIET, "MLFLOW_LOCK_MODEL_DEPENDENCIES": "false"}
    with store.environment(settings), store.silenced(), warnings.catch_warnings(action="ignore"):
        yield


def _save(flavour: str, model: Any, example: Any, outputs: Any, part: Path, run: RunDir) -> None:
    import importlib

    try:
        from mlflow.models import infer_signature

        saver = importlib.import_module(f"mlflow.{flavour}")
    except ImportError as error:
        fix = "pip install 'hpcml[mlflow]'" if "mlflow" in str(error) else ""
        raise HpcmlError(f"a {flavour} model can't be saved here: {error}", fix=fix) from None
    signature = None if outputs is None else infer_signature(example, outputs)
    if signature is None and flavour in KERAS:
        signature = _declared_signature(model)
    options: dict[str, Any] = {"signature": signature, "pip_requirements": _requirements(flavour, run)}
    options |= {"input_example": example, "metadata": {RUN_KEY: run.id}}
    if flavour == "pytorch" and signature is not None and _exportable(model, example):
        options["serialization_format"] = "pt2"  # a graph, where the default is a pickle of its class
    if flavour == "pyfunc":
        saver.save_model(str(part), python_model=model, **options)
    else:
        saver.save_model(model, str(part), **options)
    if any(kind.__module__.startswith("tf_keras") for kind in type(model).__mro__):
        _name_tf_keras(part)


def _name_tf_keras(folder: Path) -> None:
    """Let the folder name tf-keras itself.

    MLflow notes ``tensorflow.keras``, which is Keras 3 in a process without TF_USE_LEGACY_KERAS: it can't load this.
    """
    from mlflow.models import Model

    write_bytes(folder / "data" / "keras_module.txt", b"tf_keras")
    description = Model.load(folder / DESCRIPTION)
    description.flavors["tensorflow"]["keras_module"] = "tf_keras"
    description.save(folder / DESCRIPTION)


def _requirements(flavour: str, run: RunDir) -> list[str]:
    """Pin what loading needs, and constrain the rest to what is installed; MLflow would load the model to find out."""
    packages = installed.packages()
    names = ("mlflow", *REQUIREMENTS.get(flavour, (flavour, "numpy", "pandas")))
    lock = run.packages
    if not lock.exists():
        write_bytes(lock, "".join(f"{name}=={version}\n" for name, version in sorted(packages.items())).encode())
    return [*(f"{name}=={packages[name]}" for name in names if name in packages), f"-c {lock}"]


def _rows(example: Any, *, single: bool) -> Any:
    """Return the first rows of an example as NumPy arrays, 64-bit floats as 32-bit ones where that is asked for."""
    if example is None or hasattr(example, "iloc"):
        return example if example is None else example[:EXAMPLE_ROWS]
    if isinstance(example, Mapping):
        return {name: _rows(value, single=single) for name, value in example.items()}
    import numpy as np

    if hasattr(example, "detach"):  # a torch tensor, perhaps on a GPU
        example = example.detach().cpu()
    rows = np.asarray(example[:EXAMPLE_ROWS])
    return rows.astype(np.float32) if single and rows.dtype == np.float64 else rows


def _outputs(flavour: str, model: Any, example: Any) -> Any:
    """Return what the model says to the example, as NumPy."""
    if flavour in KERAS:
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.convert_to_tensor, example)
        said = model(inputs, training=False) if hasattr(model, "fit") else model(inputs)
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), said)
    if flavour == "pytorch":
        import torch

        with torch.no_grad():
            said = model(torch.as_tensor(example))
        return said.numpy()
    if flavour == "pyfunc":
        return model.predict(None, example)
    return model.predict(example)


def _declared_signature(model: Any) -> Any:
    """Return the signature that a Keras model's own inputs and outputs declare; None without any."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(tensors: Any) -> Schema:
        import numpy as np

        shapes = [
            (np.dtype(str(getattr(t.dtype, "name", t.dtype))), [-1, *(n or -1 for n in t.shape[1:])]) for t in tensors
        ]
        names = [None] if len(shapes) == 1 else [tensor.name for tensor in tensors]
        return Schema([TensorSpec(kind, shape, name) for (kind, shape), name in zip(shapes, names, strict=True)])

    if not getattr(model, "inputs", None):
        return None
    return ModelSignature(schema(model.inputs), schema(model.outputs))


def _plain_torch(model: Any) -> Any:
    """Return a copy on the CPU, set to evaluate, and without what distributes it."""
    import copy

    import torch

    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return copy.deepcopy(model).cpu().eval()


def _exportable(model: Any, example: Any) -> bool:
    """Whether torch can export the model's graph: one array in, no script, nothing that it can't trace."""
    import numpy as np
    import torch

    if not isinstance(example, np.ndarray) or isinstance(model, torch.jit.ScriptModule) or len(example) < 2:
        return False
    try:
        torch.export.export(model, (torch.as_tensor(example),))
    except Exception:  # what it can't trace it says in many ways
        return False
    return True


def _replace(part: Path, target: Path) -> None:
    """Put a folder in place of another; a reader sees the old, none, or the new, never half."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
