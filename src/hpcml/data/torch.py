"""Samples into torch: a sampler of whole batches, a data set that reads a batch at once, and a DataLoader of both.

torch and Pillow are imported inside the functions.
"""

import functools
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from .order import Order

if TYPE_CHECKING:
    import torch

    from .collection import Collection, Wanted

MOST_WORKERS = 8


class Shares:
    """A sampler of batches: this rank's rows of each global batch of an epoch.

    Attributes:
        batch_size: samples of one; num_replicas, rank: among how many ranks; epoch: whose order it is.
    """

    def __init__(self, order: Order) -> None:
        self._order, self._first_step = order, 0
        self.batch_size, self.num_replicas, self.rank, self.epoch = order.share, order.world, order.rank, 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the order of an epoch, the same on every rank; leave out the steps of it that are done already."""
        self.epoch, self._first_step = epoch, first_step

    def __iter__(self) -> Iterator[Any]:
        return (rows for rows in self._order.batches(self.epoch, self._first_step) if len(rows))

    def __len__(self) -> int:
        order = self._order
        last = order.count % order.global_batch
        empty = (
            not order.drop_remainder
            and last > 0
            and not last * (order.rank + 1) // order.world - last * order.rank // order.world
        )
        return max(order.steps - self._first_step - empty, 0)


class Samples:
    """A map-style data set: indexed by a row, or by the rows of a batch, which are read at once."""

    def __init__(self, samples: "Collection", wanted: "Wanted") -> None:
        self._samples, self._raw = samples, wanted.raw
        self._decode = wanted.decode or functools.partial(_image, size=wanted.image_size or (0, 0))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, rows: Any) -> Any:
        """Return ``(x, label)``, with a first dimension where there are several rows."""
        import numpy as np
        import torch

        if np.ndim(rows) == 0:
            x, label = self[np.asarray([rows])]
            return x[0], label[0]
        label = torch.from_numpy(self._samples.labels[rows])
        if self._raw is not None:
            return torch.from_numpy(self._samples.gather(rows)).reshape(-1, *self._raw), label
        contents = self._samples.read(rows)
        alone = torch.utils.data.get_worker_info() is None
        decoded = (_threads(os.getpid()).map if alone else map)(self._decoded, rows, contents)
        return torch.stack(list(decoded)), label

    def _decoded(self, row: int, content: bytes) -> Any:
        import torch

        try:
            return torch.as_tensor(self._decode(content))
        except HpcmlError:
            raise
        except Exception as error:
            name = f"{self._samples.path}/{self._samples.names[row]}"
            raise HpcmlError(f"can't be decoded: {error}", origin=name, fix=self._samples.mended_by) from error


def loader(
    samples: "Collection", order: Order, wanted: "Wanted", how: Mapping[str, Any]
) -> "torch.utils.data.DataLoader[Any]":
    """Return a DataLoader of this rank's shares; see ``Collection.torch``."""
    import torch

    workers = 0 if wanted.raw is not None else min(MOST_WORKERS, max(1, torch.get_num_threads() - 1))
    how = {"num_workers": workers, **how}
    if how["num_workers"]:
        how.setdefault("persistent_workers", True)
    # batch_size=None: the sampler makes the batches (torch.utils.data, "Disable automatic batching").
    return torch.utils.data.DataLoader(Samples(samples, wanted), batch_size=None, sampler=Shares(order), **how)


def _image(content: bytes, size: tuple[int, int]) -> Any:
    """Return JPEG or PNG as uint8 (3, height, width). Pillow reads it whatever else is installed: the same pixels anywhere."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise HpcmlError(
            f"images are decoded by Pillow: {error}", fix="pip install pillow, or decode=a function"
        ) from None
    with Image.open(io.BytesIO(content)) as image:
        resized = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


@functools.cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Return this process's threads for decoding: Pillow lets go of Python's lock meanwhile."""
    import torch

    # hpcml.begin() gives torch as many threads as the rank has cores; the node may have more.
    return ThreadPoolExecutor(torch.get_num_threads(), "hpcml-decode")
