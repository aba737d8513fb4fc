"""What the Keras callback does for Horovod beside its own: it compares the ranks' weights, through Horovod.

Here a process has one replica and Keras knows of no other, so its strategy can't tell whether the ranks train together.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..errors import HpcmlError
from . import horovod
from .ddp import raise_unless_same
from .recorder import Recorder, devices_of
from .tensorflow import advice
from .torch import CHECKED_STEPS


class ComparedRecorder(Recorder):
    """A ``Recorder`` that compares the ranks after the same steps as a torch training does, and after the first epoch.

    It looks before the next step, when the callbacks of the last one have run: ``BroadcastGlobalVariablesCallback`` makes
    the weights equal after the first.
    """

    _supports_tf_logs = True  # for the hooks of a batch: Keras need not wait for its numbers

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._step = self._before = self._compared_at = 0
        self._compared_s = 0.0

    def _check(self) -> None:
        if not any(one.__module__.startswith("tf_keras.") for one in type(self.model).__mro__):
            fix = "build the model with tf.keras as it is after hpcml.begin()"
            raise HpcmlError(horovod.NOT_AVERAGED, origin=f"a model of {type(self.model).__module__}", fix=fix)
        horovod.check_started(self._expected, sys.modules.get("horovod.tensorflow"))
        counts = [one for (one,) in gather([self.params.get("steps") or -1])]
        if len(set(counts)) > 1:
            fix = "the same number of batches for each: drop_remainder=True, or steps_per_epoch"
            raise HpcmlError(f"the ranks have {counts} batches an epoch; they would wait for each other", fix=fix)
        self._step = self._before = self._compared_at = 0
        if self._began is not None and self._rank == 0:
            for text in advice(self._expected, self._expected.world):
                self._journal.message("warning", text)
                print(f"hpcml: {text}", flush=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._before = self._step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if any(self._compared_at < step <= self._step for step in CHECKED_STEPS):
            self._compare()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step = self._before + batch + 1  # with steps_per_execution several at once

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if epoch == 0 and self._compared_at < self._step:
            self._compare()

    def _end_training_part(self) -> None:
        super()._end_training_part()
        self._trained_s, self._compared_s = (self._trained_s or 0.0) - self._compared_s, 0.0

    def _compare(self) -> None:
        began, first = time.perf_counter(), self._compared_at == 0
        hashes = gather([weights_hash(self.model)])
        same = [one == hashes[0] for one in hashes]
        self._compared_at = self._step
        if first:
            self._journal.write(
                "replicas",
                in_sync=same.count(same[self._rank]),
                expected=self._expected.world,
                devices=devices_of(self.model.distribute_strategy),
                virtual=self._expected.virtual,
            )
        raise_unless_same(same, self._step, horovod.STRATEGY, horovod.FIX_KERAS)
        self._compared_s += time.perf_counter() - began


def weights_hash(model: Any) -> int:
    """Return an int64 that stands for the trained weights, in order, with types and shapes.

    The others are left out: the moving averages of BatchNormalization are each rank's own.
    """
    digest = hashlib.sha256()
    for weight in model.trainable_weights:
        values = weight.numpy()
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(values.tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def gather(values: Sequence[int]) -> list[list[int]]:
    """Return the numbers of every rank (int64), by rank, through Horovod's TensorFlow side."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    with tf.device("CPU:0"):
        told = hvd.allgather(tf.constant([list(values)], tf.int64), name="hpcml")
    return [[int(one) for one in rank] for rank in told.numpy()]
