"""Predictions of a saved model for a file of inputs: read, checked against the model's signature, predicted, written."""

import contextlib
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import HpcmlError, nearest

INPUTS = (".npy", ".npz", ".csv", ".json")
OUTPUTS = (".npy", ".npz", ".csv", ".json")


def read(path: Path, array: str | None = None) -> Any:
    """Read inputs: an array of shape ``(rows, …)``, or a dict of arrays where a file names several.

    Args:
        path: ``.npy``; ``.npz``; ``.csv`` of numbers, a row each, with or without a line of names; ``.json``: a list of
            rows, or an object of them by input, also below ``inputs`` or ``instances`` as model servers take it.
        array: which array of an ``.npz``, where the model does not take all of them by name.

    Raises:
        HpcmlError: no such file, or it can't be read as what its name says.
    """
    import numpy as np

    kind = path.suffix.lower()
    if kind not in INPUTS:
        raise HpcmlError(f"{path} is no input that is known", allowed=", ".join(INPUTS))
    try:
        if kind == ".npy":
            return np.load(path, allow_pickle=False)
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return _pick({name: file[name] for name in file.files}, array, path)
        if kind == ".csv":
            return _read_csv(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            found = next((found[key] for key in ("inputs", "instances") if key in found), found)
        return (
            {name: np.asarray(rows) for name, rows in found.items()} if isinstance(found, dict) else np.asarray(found)
        )
    except OSError as error:
        raise HpcmlError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:  # also of json, of UTF-8 and of ragged rows
        raise HpcmlError(f"{path} does not hold what a {kind} file should: {error}") from None


def fit(data: Any, schema: Any, origin: str) -> Any:
    """Return inputs as the signature wants them: dtype, shape of a row, names.

    Rows that are flat (a CSV's) get the signature's shape where the numbers are as many. A value changes its type only
    where it stays the same number.

    Args:
        data: as ``read`` gives it.
        schema: the signature's inputs (``mlflow.types.Schema``); None without a signature.
        origin: where the inputs are from, for messages.

    Raises:
        HpcmlError: they don't fit; what the signature says is told.
    """
    if schema is None:
        return data
    if not schema.is_tensor_spec():
        return _table(data, schema, origin)
    specs = list(schema.inputs)
    if not schema.has_input_names():
        if isinstance(data, dict):
            raise HpcmlError(
                f"the model takes one array of {_told(specs[0])}, the file has {', '.join(data)}",
                origin=origin,
                fix="name one: --array NAME",
            )
        return _fit_one(data, specs[0], origin)
    if not isinstance(data, dict):
        if len(specs) > 1:
            wanted = ", ".join(f"{spec.name} {_told(spec)}" for spec in specs)
            raise HpcmlError("the model takes several arrays by name, this is one", origin=origin, allowed=wanted)
        data = {specs[0].name: data}
    for spec in specs:
        if spec.name not in data:
            fix = nearest(spec.name, data)
            raise HpcmlError(f"no array {spec.name!r}", origin=origin, allowed=", ".join(data), fix=fix)
    return {spec.name: _fit_one(data[spec.name], spec, f"{origin}: {spec.name}") for spec in specs}


def predict(model: Any, data: Any) -> Any:
    """Return a loaded model's predictions as an array, or a dict of them."""
    import numpy as np

    from .models import quietly

    # Keras draws a progress bar on stdout, where the predictions go.
    with quietly(), contextlib.redirect_stdout(sys.stderr):
        said = model.predict(data)
    if hasattr(said, "to_numpy"):
        return {str(name): said[name].to_numpy() for name in said} if hasattr(said, "columns") else said.to_numpy()
    if isinstance(said, dict):
        return {str(name): np.asarray(values) for name, values in said.items()}
    return np.asarray(said)


def write(predictions: Any, path: Path) -> None:
    """Write predictions as ``.csv``, ``.npy``, ``.npz`` or ``.json``, by the name of the file.

    Raises:
        HpcmlError: another kind of file; several arrays for one that holds one; the file can't be written.
    """
    import numpy as np

    kind = path.suffix.lower()
    several = isinstance(predictions, dict)
    if kind not in OUTPUTS or (several and kind == ".npy"):
        allowed = ", ".join(kind for kind in OUTPUTS if not (several and kind == ".npy"))
        raise HpcmlError(f"predictions can't be written to {path.name}", origin="-o", allowed=allowed)
    try:
        if kind == ".npy":
            np.save(path, predictions)
        elif kind == ".npz":
            np.savez(path, **(predictions if several else {"predictions": predictions}))
        elif kind == ".json":
            plain = {k: v.tolist() for k, v in predictions.items()} if several else predictions.tolist()
            path.write_text(json.dumps(plain) + "\n", encoding="utf-8")
        else:
            path.write_text("".join(f"{line}\n" for line in lines(predictions)), encoding="utf-8")
    except OSError as error:
        raise HpcmlError(f"{path} can't be written: {error.strerror}", origin="-o") from None


def lines(predictions: Any) -> Iterator[str]:
    """Yield predictions as CSV, a row each; each number in the fewest digits that give it back."""
    import numpy as np

    named = predictions if isinstance(predictions, dict) else {"": predictions}
    columns = list[tuple[str, Any]]()
    for name, values in named.items():
        table = np.asarray(values)
        table = table.reshape(len(table), -1) if table.ndim else table.reshape(1, 1)
        width = table.shape[1]
        columns += [(name if width == 1 else f"{name}.{place}", table[:, place]) for place in range(width)]
    if isinstance(predictions, dict):
        yield ",".join(name for name, _ in columns)
    yield from (",".join(map(str, row)) for row in zip(*(values for _, values in columns), strict=True))


def _pick(arrays: dict[str, Any], array: str | None, path: Path) -> Any:
    if array is None:
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays
    if array not in arrays:
        fix = nearest(array, arrays)
        raise HpcmlError(f"{path} has no array {array!r}", origin="--array", allowed=", ".join(arrays), fix=fix)
    return arrays[array]


def _read_csv(path: Path) -> Any:
    """Read numbers as an array; with a first line of names as a data frame."""
    import numpy as np

    with path.open(encoding="utf-8", newline="") as file:
        first = next(csv.reader(file), [])
    if not first:
        raise ValueError("it is empty")
    if not all(map(_is_number, first)):
        import pandas

        return pandas.read_csv(path)
    return np.loadtxt(path, delimiter=",", ndmin=2)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fit_one(data: Any, spec: Any, origin: str) -> Any:
    """Return an array in the type and shape of one input."""
    import numpy as np

    values = data.to_numpy() if hasattr(data, "to_numpy") else np.asarray(data)
    wanted = [int(size) for size in spec.shape]
    if values.ndim == 2 and len(wanted) != 2 and -1 not in wanted[1:] and values.shape[1] == np.prod(wanted[1:]):
        values = values.reshape(len(values), *wanted[1:])
    fits = len(values.shape) == len(wanted) and all(w in (-1, n) for w, n in zip(wanted, values.shape, strict=True))
    if not fits:
        one = list(values.shape) == wanted[1:]
        raise HpcmlError(
            f"the input has shape {_shape(values.shape)}, the model takes {_told(spec)}",
            origin=origin,
            fix="put the one row in a list of rows" if one else "reshape it; the first number counts the rows",
        )
    try:
        cast = values.astype(spec.type)
    except (TypeError, ValueError):
        cast = None
    kinds = values.dtype.kind, np.dtype(spec.type).kind
    # Rounding a double to a float is what the training did; another number is not.
    if cast is None or not (kinds == ("f", "f") or np.array_equal(cast, values)):
        raise HpcmlError(f"the input is {values.dtype}, the model takes {_told(spec)}", origin=origin)
    return cast


def _table(data: Any, schema: Any, origin: str) -> Any:
    """Return a data frame with the columns of a signature that names columns."""
    import pandas

    names = schema.input_names()
    if not hasattr(data, "columns"):
        data = pandas.DataFrame(data if isinstance(data, dict) else data.reshape(len(data), -1))
        if len(data.columns) == len(names) and not set(names) <= set(data.columns):
            data.columns = names
    missing = [str(name) for name in names if name not in data.columns]
    if missing:
        raise HpcmlError(
            f"columns are missing: {', '.join(missing)}", origin=origin, allowed=", ".join(map(str, names))
        )
    return data[names]


def _told(spec: Any) -> str:
    return f"{_shape(spec.shape)} of {spec.type}"


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join("rows" if size == -1 else str(size) for size in shape) + ")"
