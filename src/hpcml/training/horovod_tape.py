"""A loop by hand with ``tf.GradientTape`` under Horovod: its ranks are compared when it asks for it.

``model.fit`` has a callback for that, a loop has only itself. TensorFlow is imported inside the functions.
"""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

from ..tracking.journal import Journal
from . import horovod
from .common import Expected
from .ddp import raise_unless_same

FIX = (
    "tape = hvd.DistributedGradientTape(tape) before tape.gradient(), and hvd.broadcast_variables(variables, root_rank=0) "
    "after the first step"
)


def check(journal: Journal, expected: Expected, rank: int, weights: Sequence[Any], step: int) -> None:
    """Compare the ranks' weights, bit for bit, and record how many are in sync. A collective: call it on all ranks.

    Args:
        weights: the variables that are trained, such as ``model.trainable_weights``, in the same order on all ranks.
        step: steps done, for the message. After the first one gradients that are not averaged differ already.

    Raises:
        HpcmlError: Horovod was not started with all tasks of the job, or the ranks' weights differ.
    """
    from .horovod_keras import gather

    horovod.check_started(expected, sys.modules.get("horovod.tensorflow"))
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.numpy()
        digest.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    hashes = gather([int.from_bytes(digest.digest()[:8], "little", signed=True)])
    same = [one == hashes[0] for one in hashes]
    device = "GPU:0" if expected.gpus_per_task and not expected.virtual else "CPU:0"
    journal.write(
        "replicas", in_sync=same.count(same[rank]), expected=expected.world, devices=[device], virtual=expected.virtual
    )
    raise_unless_same(same, step, horovod.STRATEGY, FIX)
