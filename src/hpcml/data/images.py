"""A folder of images by class, ``NAME/CLASS/*.jpg``, and files of pretrained weights: found, checked, split by a seed.

Nothing is ever downloaded here: compute nodes have no network, and every rank would do it. What is missing is an error,
or a warning, that says where it is published and where it belongs. Decoding stays in the notebook.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any

from .. import rundir, site
from ..errors import HpcmlError, Problem, nearest
from ..job import project_of
from ..slurm import commands

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Part = tuple[list[str], NDArray[Any]]

# As Keras names and fetches it (keras/applications/resnet.py): without the classifier, 94 MB.
RESNET50 = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_HDF5 = b"\x89HDF\r\n\x1a\n"

SUFFIXES = (".jpg", ".jpeg", ".png")  # tf.io.decode_jpeg reads both formats
_JPEG, _JPEG_END, _PNG = b"\xff\xd8\xff", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
_LAYOUT = "one folder for each class, with its images in it: NAME/CLASS/*.jpg"
# Opening a small file on Lustre takes about 2 ms of waiting; this many at once read 3,670 of them in half a second.
READERS = 16
_SHOWN = 5


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, split into a training and a test part.

    Attributes:
        path: of the folder.
        classes: their names in alphabetical order; a label is a position in it.
        train, test: ``(files, labels)``: paths as text, and int64 (n,), in an order that the seed decides.
        fingerprint: 12 hexadecimal digits for names, contents and split: equal for equal data, in every process.
    """

    path: Path
    classes: tuple[str, ...]
    train: "Part"
    test: "Part"
    fingerprint: str


def load(data: str, seed: int = 123) -> ImageFolder:
    """Find a folder of images, read every file once, and split it: of each class 4/5 to train on, the rest to test.

    Args:
        data: a name such as ``flowers``, below the site's data folder (``$HPCML_DATA``, else as the site's file says);
            or a path, with a ``/`` in it. ``~`` and ``$VARIABLES`` are expanded.
        seed: of split and order; see ``hpcml.data.mnist`` for why it stays what it is.

    Raises:
        HpcmlError: no such folder, fewer than two classes, a class with fewer than two images, files that are no whole
            images or can't be read.
    """
    import numpy as np

    path = find(data)
    by_class = by_class_in(path, data)
    names = [f"{one}/{name}" for one, files in by_class.items() for name in files]
    digests = digests_of(path, names)
    labels: NDArray[Any] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
    parts = split(labels, seed)
    first, second = (([str(path / names[row]) for row in part], labels[part]) for part in parts)
    known = fingerprint([[(names[row], digests[row]) for row in part] for part in parts])
    return ImageFolder(path, tuple(by_class), first, second, known)


def split(labels: "NDArray[Any]", seed: int) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Return the rows to train on and those to test with: of each class 4/5 and the rest, in an order the seed decides.

    Args:
        labels: int64 (n,), 0…classes - 1, sorted.
        seed: see ``hpcml.data.mnist`` for why the split of a seed stays what it is.
    """
    import numpy as np

    random = np.random.RandomState(seed)
    train, test = [], []
    for label in range(int(labels.max()) + 1):
        rows = random.permutation(np.flatnonzero(labels == label))
        cut = len(rows) * 4 // 5
        train.append(rows[:cut])
        test.append(rows[cut:])
    first, second = (random.permutation(np.concatenate(rows)) for rows in (train, test))
    return first, second


def fingerprint(parts: Iterable[Iterable[tuple[str, bytes]]]) -> str:
    """Return 12 hexadecimal digits for parts of a data set: names below its folder, with SHA-256, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"".join(os.fsencode(name) + b"\0" + content for name, content in part))
        digest.update(b"\1")
    return digest.hexdigest()[:12]


def pretrained(weights: str, file: str = RESNET50) -> str | None:
    """Return the path of a file of weights for ``tf.keras.applications``; None for a random start.

    Args:
        weights: ``imagenet``: the published file, below the site's data folder, in ``weights/``; where it is not there
            a warning says so, and how to get it. ``random``: none. Or a path to an ``.h5`` file.
        file: the published file's name.

    Raises:
        HpcmlError: no file at a path that was given, or a file that is not HDF5.
    """
    if weights == "random":
        return None
    allowed = f"imagenet ({file} below the data folder), random, or a path to an .h5 file"
    if weights != "imagenet" and not weights.endswith(".h5"):
        raise HpcmlError(f"weights = {weights!r}", origin="weights", allowed=allowed)
    path = root() / "weights" / file if weights == "imagenet" else _expanded(weights)
    try:
        with path.open("rb") as raw:
            whole = raw.read(len(_HDF5)) == _HDF5
    except FileNotFoundError:
        if weights != "imagenet":
            raise HpcmlError(f"no file at {path}", origin="weights", allowed=allowed) from None
        print(
            f"hpcml: warning: no pretrained weights at {path}: the network starts from random weights, and frozen ones "
            "learn nothing: expect a low accuracy\n"
            f"  fix: where there is a network: {'hpcml data fetch resnet50' if file == RESNET50 else f'put {file} there'}",
            file=sys.stderr,
            flush=True,
        )
        return None
    except OSError as error:
        raise HpcmlError(f"{path} can't be read: {error.strerror}", origin="weights", allowed=allowed) from None
    if not whole:
        raise HpcmlError(f"{path} is no HDF5 file", origin="weights", allowed=allowed, fix="fetch it again")
    return str(path)


def root() -> Path:
    """Return the data folder here: ``$HPCML_DATA``, else the one of the run's site, else of the site that applies here."""
    runs, run = os.environ.get("HPCML_RUNS"), os.environ.get("HPCML_RUN")
    plan = rundir.read_json(rundir.RunDir(Path(runs), run).plan) if runs and run else {}
    if plan:
        return site.data_root(site.load(plan["site"], "the run's plan"), Path(plan["project"]))
    where, _ = site.choose(None, commands.cluster_name())
    return site.data_root(where, project_of(Path.cwd() / "session.py"))


def find(data: str) -> Path:
    """Return the folder of a name or path; see ``load``.

    Raises:
        HpcmlError: there is none; it says where a known data set is published and where it belongs.
    """
    origin = f"data {data!r}"
    is_name = "/" not in data and data not in (".", "..", "~") and not data.startswith("$")
    if not data:
        raise HpcmlError("no name and no path", origin=origin, allowed="a name below the data folder, or a path")
    placed = json.loads(os.environ.get("HPCML_DATASETS") or "{}").get(data)  # the job's [data], where its node has it
    path = Path(placed) if placed else root() / data if is_name else _expanded(data)
    try:
        if S_ISDIR(path.stat().st_mode):
            return path
        what, fix = f"{path} is no folder", ""
    except (FileNotFoundError, NotADirectoryError):
        what, fix = f"no folder at {path}", _brought_by(data, path)
    except OSError as error:
        what, fix = f"{path} can't be read: {error.strerror}", "make it readable"
    raise HpcmlError(what, origin=origin, allowed=_LAYOUT, fix=fix)


def _brought_by(data: str, path: Path) -> str:
    """Return how to get a data set that is not there."""
    from .fetch.published import PUBLISHED

    if data in PUBLISHED:
        kind = " --images" if PUBLISHED[data].is_mnist else ""
        return f"where there is a network: hpcml data fetch {data}{kind}; or set HPCML_DATA to the folder that holds {data}/"
    there = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    place = "a name is one below $HPCML_DATA, else the site's data folder; a path has a /"
    brought = "hpcml data fetch brings a data set there, hpcml data version checkout a version of one"
    return nearest(path.name, [*there, *PUBLISHED]) or f"{place}; {brought}"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser().absolute()


def by_class_in(path: Path, data: str, suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[str]]:
    """Return the names of each class's files, both in alphabetical order, in which no file system lists them.

    Raises:
        HpcmlError: as ``check_classes``, or a folder that can't be read.
    """
    try:
        folders = sorted(one.name for one in os.scandir(path) if one.is_dir() and not one.name.startswith("."))
        found = {
            name: sorted(one.name for one in os.scandir(path / name) if is_sample(one.name, suffixes))
            for name in folders
        }
        inner = (
            []
            if any(found.values())
            else [name for name in folders if any(one.is_dir() for one in (path / name).iterdir())]
        )
    except OSError as error:
        what = f"{error.filename} can't be read: {error.strerror}"
        raise HpcmlError(what, origin=f"data {data!r}", fix="make it readable") from None
    check_classes(found, path, data, inner)
    return found


def is_sample(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Whether a file of this name is one of the samples: by its ending, in capitals or not, and not hidden."""
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")


def check_classes(found: Mapping[str, Sequence[str]], path: Path, data: str, inner: Sequence[str] = ()) -> None:
    """Refuse what can't be split and told apart.

    Args:
        found: the files of each class.
        inner: classes that hold folders.

    Raises:
        HpcmlError: no images, fewer than two classes, or a class with fewer than two images.
    """
    origin = f"data {data!r}"
    if not any(found.values()):
        further = " or ".join(repr(str(path / name)) for name in inner[:3])
        fix = f"the classes seem to lie further down: data = {further}" if inner else ""
        raise HpcmlError(f"no images in the folders of {path}", origin=origin, allowed=_LAYOUT, fix=fix)
    if len(found) == 1:
        what = f"{path} holds one class only, {next(iter(found))!r}: there is nothing to tell apart"
        raise HpcmlError(what, origin=origin, allowed=_LAYOUT)
    few = {name: "a single image" if files else "no images" for name, files in found.items() if len(files) < 2}
    if few:
        allowed = "at least 2, of which 1 to test"
        raise HpcmlError(Problem(f"class {name!r} has {count}", origin, allowed) for name, count in few.items())


def digests_of(path: Path, names: Sequence[str]) -> list[bytes]:
    """Return the SHA-256 of each file below a folder, all read once, by many readers.

    Raises:
        HpcmlError: which are no whole images or can't be read: a decoder would end the training without their names.
    """
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(_digest, (str(path / name) for name in names)))
    wrong = [(name, one) for name, one in zip(names, read, strict=True) if isinstance(one, str)]
    if wrong:
        raise HpcmlError(_told(path, wrong))
    return [one for one in read if isinstance(one, bytes)]


def _told(path: Path, wrong: Sequence[tuple[str, str]]) -> Iterable[Problem]:
    fix = "remove it, or fetch it again"
    for name, what in wrong[:_SHOWN]:
        yield Problem(what, name, fix=fix)
    if len(wrong) > _SHOWN:
        yield Problem(f"and {len(wrong) - _SHOWN} more", str(path))


def digest_of(content: bytes) -> bytes | str:
    """Return the SHA-256 (32 bytes) of an image file's content, or what is wrong with it; it doesn't decode.

    It looks at both ends only: an empty file, something else than JPEG and PNG, and a JPEG that is cut off are told.
    """
    if not content:
        return "an empty file"
    if not content.startswith((_JPEG, _PNG)):
        return "neither JPEG nor PNG, whatever its name says"
    # The end marker can't occur within image data; cameras add bytes after it, and a thumbnail with its own before.
    if content.startswith(_JPEG) and _JPEG_END not in content[len(content) // 2 :]:
        return "a JPEG that is cut off"
    return hashlib.sha256(content).digest()


def _digest(file: str) -> bytes | str:
    """Return ``digest_of`` a file's content, or why it can't be read; of what is named as no image only an empty one is told."""
    try:
        file.encode()
        content = Path(file).read_bytes()
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return digest_of(content) if not content or is_sample(Path(file).name) else hashlib.sha256(content).digest()
