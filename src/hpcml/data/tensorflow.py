"""Samples into ``tf.data``: rows in the order of the epochs, read by blocks, decoded in parallel, made ready ahead.

TensorFlow is imported inside the functions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from .order import Order

if TYPE_CHECKING:
    import tensorflow

    from .collection import Collection, Wanted

BLOCK = 32  # samples that are read at once before they are decoded: the call into Python costs 0.1 ms
# Batches of undecoded samples that are gathered by one call, and the bytes that this may make: the call costs 0.2 ms, as
# much as it takes to copy 1 MB.
GATHERED, GATHERED_BYTES = 16, 4 * 2**20
AHEAD = 4  # blocks that are read at the same time, so that decoding doesn't wait for the file system


def dataset(
    samples: "Collection",
    order: Order,
    wanted: "Wanted",
    *,
    epochs: Sequence[int],
    first_step: int,
    local: bool,
    prefetch: int,
) -> "tensorflow.data.Dataset":
    """Return the batches of some epochs; see ``Collection.tensorflow``.

    Raises:
        HpcmlError: small last batches of several epochs, for a strategy over several ranks.
    """
    import numpy as np
    import tensorflow as tf

    feed = _Feed(samples, order, wanted, tuple(epochs), first_step, local)
    numbers = tf.data.Dataset.from_tensor_slices(np.asarray(epochs, np.int64))
    if feed.is_even or len(epochs) < 2:
        found = feed.batches(numbers)
    elif feed.is_step:
        found = numbers.flat_map(lambda epoch: feed.batches(tf.data.Dataset.from_tensors(epoch)))
    else:
        what = (
            f"{order.count} samples make no whole batches, and a strategy would cut the epochs elsewhere on each rank"
        )
        raise HpcmlError(what, origin="epochs", fix="drop_remainder=True, one epoch at a time, or local=True")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return found.prefetch(prefetch).with_options(options)


@dataclass(frozen=True)
class _Feed:
    """One rank's batches in ``tf.data``; the fields are the arguments of ``dataset``."""

    samples: "Collection"
    order: Order
    wanted: "Wanted"
    epochs: tuple[int, ...]
    first_step: int
    local: bool

    @property
    def is_step(self) -> bool:
        """Whether a batch is this rank's part of one step; else ``tf.distribute`` makes several steps' parts of it."""
        return self.local or self.order.world == 1

    @property
    def is_even(self) -> bool:
        """Whether all of this rank's parts of steps have one size."""
        return self.order.drop_remainder or self.order.count % self.order.global_batch == 0

    @property
    def size(self) -> int:
        """Samples of a batch."""
        return self.order.share if self.local else self.order.global_batch

    @property
    def is_whole(self) -> bool:
        """Whether the last batch is as large as the others."""
        steps = max(len(self.epochs) * self.order.steps - self.first_step, 0)
        return self.is_even and steps * self.order.share % self.size == 0

    def batches(self, epochs: Any) -> Any:
        """Return the batches of a data set of epoch numbers."""
        return self._gathered(epochs) if self.wanted.raw is not None else self._decoded(epochs)

    def _rows(self, epoch: Any) -> Any:
        """Return this rank's rows of an epoch, a tensor (n,)."""
        import tensorflow as tf

        def part(epoch: Any) -> Any:
            return self.order.part(int(epoch), self.first_step if epoch == self.epochs[0] else 0)

        return tf.ensure_shape(tf.numpy_function(part, [epoch], tf.int64, stateful=False), [None])

    def _gathered(self, epochs: Any) -> Any:
        """Return batches of samples of one size, each gathered at once: nothing is done for each sample by itself."""
        import tensorflow as tf

        shape = self.wanted.raw or ()
        if self.is_even:
            steps = epochs.flat_map(
                lambda epoch: tf.data.Dataset.from_tensor_slices(tf.reshape(self._rows(epoch), [-1, self.order.share]))
            )
            rows = steps if self.is_step else steps.batch(self.order.world).map(lambda rows: tf.reshape(rows, [-1]))
        else:
            rows = epochs.flat_map(lambda epoch: tf.data.Dataset.from_tensor_slices(self._rows(epoch))).batch(self.size)
        together = max(1, min(GATHERED, GATHERED_BYTES // (self.size * math.prod(shape) or 1))) if self.is_whole else 1
        batch = [self.size if self.is_whole else None]

        def gather(rows: Any) -> Any:
            return self.samples.gather(rows.ravel()).reshape(*rows.shape, *shape), self.samples.labels[rows]

        def gathered(rows: Any) -> Any:
            x, label = tf.numpy_function(gather, [rows], (tf.uint8, tf.int64), stateful=False)
            return tf.ensure_shape(x, [None, *batch, *shape]), tf.ensure_shape(label, [None, *batch])

        found = rows.batch(together).map(gathered, num_parallel_calls=AHEAD).unbatch()
        # tf.distribute cuts a smaller last batch into steps of the right size only where it knows the size of all.
        return found if self.is_whole else found.unbatch().batch(self.size)

    def _decoded(self, epochs: Any) -> Any:
        """Return batches of samples that are decoded one by one, in parallel."""
        import numpy as np
        import tensorflow as tf

        decode = self.wanted.decode or _image(*(self.wanted.image_size or (0, 0)))

        def read(rows: Any) -> Any:
            return np.array(self.samples.read(rows), object), self.samples.labels[rows]

        def block(rows: Any) -> Any:
            content, label = tf.numpy_function(read, [rows], (tf.string, tf.int64), stateful=False)
            return tf.ensure_shape(content, [None]), tf.ensure_shape(label, [None])

        rows = epochs.flat_map(lambda epoch: tf.data.Dataset.from_tensor_slices(self._rows(epoch)))
        found = rows.batch(BLOCK).map(block, num_parallel_calls=AHEAD).unbatch()
        found = found.map(lambda content, label: (decode(content), label), num_parallel_calls=tf.data.AUTOTUNE)
        return found.batch(self.size, drop_remainder=self.is_whole)


def _image(height: int, width: int) -> Callable[[Any], Any]:
    import tensorflow as tf

    def decode(content: Any) -> Any:
        image = tf.image.resize(tf.io.decode_jpeg(content, channels=3), (height, width))  # PNG too
        return tf.cast(tf.round(image), tf.uint8)

    return decode
