"""``hpcml.data.open(name)``: a folder of samples by class, packed or not, read at random by the same call.

The samples of ``NAME/CLASS/FILE`` come from single files or from the shards that ``hpcml data pack`` made of them: names,
labels, split, order and fingerprint are the same. ``tensorflow`` and ``torch`` feed a training from it. What is read is
checked before: single files when the folder is opened, packed ones when they are packed.
"""

import hashlib
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import HpcmlError
from . import images
from .files import Files
from .order import Order

if TYPE_CHECKING:
    import tensorflow
    import torch
    from numpy.typing import NDArray

Size = int | tuple[int, int]
PACKED = "dataset.json"  # what a packed folder has


@dataclass(frozen=True)
class Wanted:
    """What a sample becomes; one of the three is given."""

    image_size: tuple[int, int] | None
    decode: Callable[[Any], Any] | None
    raw: tuple[int, ...] | None


class Source(Protocol):
    """Where samples are read, by their row."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the contents of some samples."""
        ...

    def gather(self, rows: "NDArray[Any]") -> "NDArray[Any]":
        """Return samples of one size as uint8 (n, size)."""
        ...


class Split(NamedTuple):
    """A part to train on and one to test with."""

    train: "Collection"
    test: "Collection"

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits for names, contents and split: that of ``hpcml.data.images.load``."""
        return images.fingerprint(part._known() for part in self)


@dataclass(frozen=True, repr=False)
class Collection:
    """Samples of a data set, in an order.

    Attributes:
        path: the folder.
        classes: their names in alphabetical order; a label is a position in it.
        names: of the samples, as ``CLASS/FILE``.
        labels: int64 (n,).
    """

    path: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: "NDArray[Any]"
    _digests: "NDArray[Any]" = field(repr=False)  # uint8 (n, 32)
    _source: Source
    _rows: "NDArray[Any]"  # of the samples in the source

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<{len(self):,} samples of {len(self.classes)} classes in {self.path}>"

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits for names, contents and order: equal for equal data, packed or not, in every process."""
        return images.fingerprint([self._known()])

    @property
    def mended_by(self) -> str:
        """What to do about a sample that can't be read or decoded."""
        packed = f"hpcml data verify {shlex.quote(str(self.path))} lists what is damaged; then pack it again"
        return "remove it, or fetch it again" if isinstance(self._source, Files) else packed

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the contents of some samples.

        Raises:
            HpcmlError: a file or shard that can't be read.
        """
        return self._source.read(self._rows[rows].tolist())

    def gather(self, rows: Sequence[int]) -> "NDArray[Any]":
        """Return samples that all have one size as uint8 (n, size).

        Raises:
            HpcmlError: they have not, or a file or shard can't be read.
        """
        return self._source.gather(self._rows[rows])

    def take(self, rows: "NDArray[Any]") -> "Collection":
        """Return some of the samples, in this order, as a collection that reads from the same files."""
        names = [self.names[row] for row in rows]
        return replace(
            self, names=names, labels=self.labels[rows], _digests=self._digests[rows], _rows=self._rows[rows]
        )

    def split(self, seed: int = 123) -> Split:
        """Return a part to train on and one to test with: of each class 4/5 and the rest, as ``hpcml.data.images.load``."""
        return Split(*(self.take(rows) for rows in images.split(self.labels, seed)))

    def tensorflow(
        self,
        global_batch: int,
        *,
        image_size: Size | None = None,
        decode: Callable[[Any], Any] | None = None,
        raw: Sequence[int] | None = None,
        seed: int | None = None,
        epochs: Iterable[int] = range(1),
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        local: bool = False,
        drop_remainder: bool | None = None,
        prefetch: int = -1,
    ) -> "tensorflow.data.Dataset":
        """Return batches ``(x, label)`` for ``model.fit``: read and decoded in parallel, ahead of the training.

        What a sample becomes is said by one of ``image_size``, ``decode`` and ``raw``. With several ranks each reads only
        its own samples, and the data set's options say so to ``tf.distribute``: leave its ``auto_shard_policy``.

        Args:
            global_batch: samples a step, over all replicas together; the ranks share it evenly.
            image_size: pixels, or (height, width): JPEG and PNG become uint8 (height, width, 3), bilinear.
            decode: makes a tensor of a file's content, a scalar ``tf.string``.
            raw: shape of uint8 files that all have as many bytes; they are not decoded.
            seed: of the order; None leaves the samples in theirs, as for a test.
            epochs: their numbers, such as ``range(run.epochs_done, epochs)``; an order follows from seed and number.
            first_step: steps of the first of them that are done already.
            rank, world: ``run.topology.rank, run.topology.world``.
            local: make batches of this rank's share, as loops by hand and Horovod want them; else of ``global_batch`` of
                this rank's samples, which a strategy of ``tf.distribute`` cuts into steps and replicas' parts.
            drop_remainder: leave out the samples of an epoch that make no whole batch; by default where there is a seed.
            prefetch: batches that are made ready ahead; -1 leaves their number to ``tf.data``.

        Raises:
            HpcmlError: values that don't fit together.
        """
        from . import tensorflow

        order = self._order(global_batch, seed, rank, world, drop_remainder)
        told = self._wanted(image_size, decode, raw)
        return tensorflow.dataset(
            self, order, told, epochs=list(epochs), first_step=first_step, local=local, prefetch=prefetch
        )

    def torch(
        self,
        global_batch: int,
        *,
        image_size: Size | None = None,
        decode: Callable[[bytes], Any] | None = None,
        raw: Sequence[int] | None = None,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        drop_remainder: bool | None = None,
        **loader: Any,
    ) -> "torch.utils.data.DataLoader[Any]":
        """Return a ``DataLoader`` of this rank's share of each global batch, ``(x, label)``.

        Its ``sampler.set_epoch(epoch)`` chooses the order before each epoch, as a ``DistributedSampler``'s does. The
        arguments are those of ``tensorflow`` where they have the same name, and else the DataLoader's own.

        Args:
            image_size: pixels, or (height, width): JPEG and PNG become uint8 (3, height, width), bilinear with antialias.
            decode: makes a tensor of a file's content, bytes.
            raw: shape of uint8 files that all have as many bytes; they are not decoded.
            loader: of ``torch.utils.data.DataLoader``, such as ``num_workers``, ``prefetch_factor`` and ``pin_memory``. By
                default no workers for ``raw``, else one for each of torch's threads, less one, at most 8.

        Raises:
            HpcmlError: values that don't fit together.
        """
        from . import torch

        order = self._order(global_batch, seed, rank, world, drop_remainder)
        return torch.loader(self, order, self._wanted(image_size, decode, raw), loader)

    def _order(self, global_batch: int, seed: int | None, rank: int, world: int, drop: bool | None) -> Order:
        order = Order(len(self), global_batch, seed, rank, world, seed is not None if drop is None else drop)
        if global_batch % world:
            lower = global_batch // world * world
            raise HpcmlError(
                f"global_batch = {global_batch} can't be shared evenly by {world} ranks",
                origin="global_batch",
                allowed=f"a multiple of {world}, such as {lower or world} or {lower + world}",
            )
        return order

    def _wanted(
        self, image_size: Size | None, decode: Callable[[Any], Any] | None, raw: Sequence[int] | None
    ) -> Wanted:
        if (image_size, decode, raw).count(None) != 2:
            what = (
                "what a sample becomes is not said" if (image_size, decode, raw).count(None) == 3 else "that is several"
            )
            allowed = (
                "image_size=180 or (height, width) for JPEG and PNG; raw=(28, 28, 1) for bytes; or decode=a function"
            )
            raise HpcmlError(what, origin=repr(self), allowed=f"one of {allowed}")
        if raw is not None and math.prod(raw) != (size := self.gather([0]).shape[1]):
            what = f"raw = {tuple(raw)} is {math.prod(raw)} bytes, {self.names[0]} has {size}"
            raise HpcmlError(what, origin=repr(self))
        both = (image_size, image_size) if isinstance(image_size, int) else image_size
        return Wanted(both, decode, tuple(raw) if raw is not None else None)

    def _known(self) -> Iterable[tuple[str, bytes]]:
        return zip(self.names, map(bytes, self._digests), strict=True)


def open(name: str, *, suffixes: Sequence[str] = images.SUFFIXES) -> Collection:
    """Open a folder of samples by class, ``NAME/CLASS/FILE``, as it is or as ``hpcml data pack`` made it.

    Args:
        name: a name such as ``flowers``, below the site's data folder (``$HPCML_DATA``, else as the site's file says);
            or a path, with a ``/`` in it. ``~`` and ``$VARIABLES`` are expanded.
        suffixes: how the names of samples end; other files, and hidden ones, are left out.

    Raises:
        HpcmlError: no such folder, fewer than two classes, a class with fewer than two samples; single files that are
            no whole images or can't be read, all listed; or a packed folder that is damaged.
    """
    path = images.find(name)
    if (path / PACKED).exists():
        return _packed(path, name, suffixes)
    by_class = images.by_class_in(path, name, suffixes)
    names = [f"{one}/{file}" for one, files in by_class.items() for file in files]
    digests = images.digests_of(path, names)
    return _collection(path, by_class, names, digests, Files(path, names), range(len(names)))


def _packed(path: Path, data: str, suffixes: Sequence[str]) -> Collection:
    from .shards import Shards

    shards = Shards(path)
    for number in range(shards.count):
        shards.fd(number)  # one that is missing or cut off is told now, not in the middle of a training
    by_class = dict[str, dict[str, int]]()
    for row, name in enumerate(shards.names):
        one, _, file = name.partition("/")
        if file and "/" not in file and not one.startswith(".") and images.is_sample(file, suffixes):
            by_class.setdefault(one, {})[file] = row
    by_class = {one: dict(sorted(by_class[one].items())) for one in sorted(by_class)}
    if not by_class:
        deeper = "; the classes seem to lie further down: pack such a folder by itself" * any(
            "/" in n for n in shards.names
        )
        what = f"no sample of a class in {len(shards):,} packed files that ends in {', '.join(suffixes)}{deeper}"
        raise HpcmlError(what, origin=f"data {data!r}", fix=f"hpcml data ls {shlex.quote(str(path))} lists them")
    images.check_classes({one: list(files) for one, files in by_class.items()}, path, data)
    names = [f"{one}/{file}" for one, files in by_class.items() for file in files]
    rows = [row for files in by_class.values() for row in files.values()]
    return _collection(path, by_class, names, [shards.digests[row] for row in rows], shards, rows)


def _collection(
    path: Path, by_class: Mapping[str, Sized], names: list[str], digests: Any, source: Source, rows: Sequence[int]
) -> Collection:
    import numpy as np

    labels: NDArray[Any] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
    table = np.frombuffer(b"".join(map(bytes, digests)), np.uint8).reshape(-1, hashlib.sha256().digest_size)
    return Collection(path, tuple(by_class), names, labels, table, source, np.asarray(rows))
