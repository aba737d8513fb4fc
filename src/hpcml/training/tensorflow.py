"""TensorFlow, thinly: devices and precision before it starts, a check of the replicas, and numbers into the journal.

The strategy itself stays in the notebook as plain TensorFlow; this module only compares what it does with what the job
was given. TensorFlow is imported inside the functions.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from ..tracking.journal import Journal
from .common import Expected
from .profile import ProfiledSteps, Profiler, only_clock

if TYPE_CHECKING:
    from . import keras_checkpoint

_CALLS = {
    "original": "no strategy",
    "mirrored": "tf.distribute.MirroredStrategy()",
    "multiworker": "tf.distribute.MultiWorkerMirroredStrategy()",
}
_CHATTER = re.compile(
    rb"WARNING: All log messages before absl|I0000 |To enable the following instructions|E0000 .*failed call to cuInit"
)


def configure(expected: Expected, *, precision: str, seed: int | None = None) -> list[str]:
    """Give TensorFlow its devices and Keras its precision and seed, before TensorFlow's runtime starts.

    Args:
        precision: a Keras mixed precision policy: ``float32``, ``mixed_float16`` or ``mixed_bfloat16``.
        seed: for Python, NumPy and TensorFlow; None leaves them alone.

    Returns:
        The names of this task's devices, such as ``GPU:0``, ``GPU:1``.

    Raises:
        HpcmlError: TensorFlow doesn't see the GPUs that were given, or has already started.
    """
    with _without_chatter():
        import tensorflow as tf

        tf.config.list_physical_devices()
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":
        tf.get_logger().setLevel("WARNING")  # INFO is a line for each tensor that is reduced
    if expected.virtual or not expected.gpus_per_task:
        names = [f"CPU:{index}" for index in range(expected.devices)]
        logical = [tf.config.LogicalDeviceConfiguration() for _ in names]
        try:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
        except RuntimeError as error:
            raise HpcmlError(
                f"TensorFlow has already started in this process, its devices can't be set any more: {error}",
                fix="restart the kernel and call hpcml.begin() before anything that uses TensorFlow",
            ) from None
    else:
        seen = tf.config.list_physical_devices("GPU")
        if len(seen) != expected.gpus_per_task:
            raise _gpus_differ(len(seen), expected.gpus_per_task, tf.test.is_built_with_cuda())
        names = [f"GPU:{index}" for index in range(len(seen))]
    tf.keras.mixed_precision.set_global_policy(precision)
    if enable := getattr(getattr(tf.keras.backend, "experimental", None), "enable_tf_random_generator", None):
        enable()  # Keras 2's random layers then draw from a generator whose state a checkpoint can keep
    if seed is not None:
        tf.keras.utils.set_random_seed(seed)
    return names


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Leave out what TensorFlow tells everyone while it is imported; anything else reaches stderr afterwards.

    Before its logs are set up it heeds no TF_CPP_MIN_LOG_LEVEL; 0 shows everything here too.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            told = b"".join(line for line in caught if not _CHATTER.match(line))
            if told:
                os.write(2, told)


def expected_replicas(expected: Expected) -> int:
    """Return how many replicas train in sync when the strategy uses everything that it can.

    On virtual CPU devices MultiWorkerMirroredStrategy takes one for each process: it looks for several GPUs in a
    process, never for several CPUs.
    """
    if expected.strategy == "original":
        return 1
    if expected.strategy == "mirrored":
        return expected.devices
    return expected.world * (1 if expected.virtual else expected.devices)


def check_replicas(expected: Expected, in_sync: int) -> None:
    """Raise where a model is not trained by all the devices that its strategy should use.

    Args:
        in_sync: replicas that the model's strategy keeps in sync.

    Raises:
        HpcmlError: devices are left out, or each of several tasks trains the whole job by itself.
    """
    right = expected_replicas(expected)
    if expected.world > 1 and in_sync <= expected.devices and (expected.strategy != "multiworker" or in_sync != right):
        raise HpcmlError(
            f"each of the {expected.world} tasks trains the whole job by itself: "
            f"{in_sync} replicas in sync, all of them in this process",
            origin=f"strategy {expected.strategy!r}",
            fix=f"create {_CALLS['multiworker']} right after hpcml.begin(strategy='multiworker') and build and compile "
            "the model in its scope; or ask for one task",
        )
    if in_sync != right:
        raise HpcmlError(
            f"the model trains on {in_sync} replicas in sync, not on {right}",
            origin=f"strategy {expected.strategy!r}",
            allowed=f"{expected.world} tasks × {expected.devices} devices: {right} replicas",
            fix=f"use {_CALLS[expected.strategy]}, without a list of devices, and build and compile the model in its "
            "scope; or give hpcml.begin() the strategy that you use",
        )


def advice(expected: Expected, in_sync: int) -> list[str]:
    """Return what a person should know about a run that is allowed but not what it may seem."""
    told = []
    if expected.strategy == "original" and expected.devices > 1:
        kind = "virtual CPU devices" if expected.virtual else "GPUs"
        told.append(f"without a strategy 1 of {expected.devices} {kind} trains and the rest idle")
    if expected.strategy == "multiworker" and expected.virtual and expected.world == 1:
        told.append(
            "on CPUs MultiWorkerMirroredStrategy has one replica for each process: "
            "to rehearse two, run two tasks (tasks_per_node = 2)"
        )
    if expected.virtual and in_sync > 1:
        told.append(
            "virtual CPU devices share this machine's cores: they show that it works, not how fast; no speed-up"
        )
    return told


def callbacks(
    journal: Journal,
    expected: Expected,
    *,
    global_batch: int,
    began: float,
    rank: int,
    profile: tuple[int, int] | None = None,
    folder: Path | None = None,
    keeper: "keras_checkpoint.Keeper | None" = None,
) -> list[Any]:
    """Return the Keras callbacks that check the replicas and keep the numbers of a ``model.fit``.

    They work with Keras 2 (tf-keras) and Keras 3 and add no work to a batch. For each epoch, counted from 1, the
    journal gets what Keras measured and ``lr``, ``epoch_time_s`` (without validation), ``samples_per_s`` (of the whole
    job) and ``step_time_ms``; once, as step 0, ``time_to_first_step_s``. The first epoch holds the building of the graph.
    ``samples_per_s`` also joins Keras's own logs, rounded, and so ``History``. An epoch that holds a profile gets
    ``profiled_steps``; these are left out of its speed, except where they are all of it.

    Args:
        global_batch: samples of one step on all replicas together.
        began: ``time.perf_counter()`` when the run began.
        rank: of this task; rank 0 speaks for all.
        profile: first and last step to profile on rank 0, from 1 over the whole training; moved where it lies outside.
        folder: for the profile, a TensorBoard log folder; without it there is none.
        keeper: of checkpoints; without it a training that is stopped ends with what it has.
    """
    import tensorflow as tf

    from . import beats, keras_checkpoint
    from .recorder import Recorder

    kind, gather = Recorder, keras_checkpoint.gather_of
    if expected.strategy == "horovod":
        from . import horovod_keras

        kind, gather = horovod_keras.ComparedRecorder, lambda strategy: horovod_keras.gather
    base = tf.keras.callbacks.Callback  # Keras 2 and 3 each want their own, known only now
    legacy = base.__module__.startswith("tf_keras.")
    window = None
    if profile is not None and folder is not None:
        tool = profiler(folder, marks=not legacy) if rank == 0 else only_clock(wait_for)
        window = ProfiledSteps(journal, profile, tool, rank=rank, virtual=expected.virtual)
    recorder = type("Recorder", (kind, base), {"legacy": legacy})
    kept = keras_checkpoint.Kept(keeper, gather) if keeper is not None else None
    return [*beats.callbacks(base), recorder(journal, expected, global_batch, began, rank, window, kept)]


def profiler(folder: Path, *, marks: bool) -> Profiler:
    """Return TensorFlow's profiler, writing below a TensorBoard log folder.

    Args:
        marks: mark the steps. Keras 3 doesn't; Keras 2 does, and two marks around a step would be counted twice.
    """
    import tensorflow as tf

    def start() -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tf.profiler.experimental.start(str(folder))

    def stop() -> Path:
        tf.profiler.experimental.stop()
        written = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        if not written:
            raise OSError(f"TensorFlow has written none into {folder}")
        return written[-1].parent.relative_to(folder.parent)

    def mark(step: int) -> contextlib.AbstractContextManager[Any]:
        # _r=1: a root event, by which xprof groups into steps (tensorflow/core/profiler: TraceMe "_r")
        return tf.profiler.experimental.Trace("train", step_num=step, _r=1) if marks else contextlib.nullcontext()

    return Profiler(start, stop, mark, wait_for)


def wait_for(results: Any) -> None:
    """Wait until a GPU has computed this: TensorFlow returns as soon as the work is queued."""
    import numpy as np
    import tensorflow as tf

    for value in tf.nest.flatten(results)[:1]:
        np.asarray(value)


def _gpus_differ(seen: int, given: int, built_with_cuda: bool) -> HpcmlError:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    origin = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "CUDA_VISIBLE_DEVICES is not set"
    what = f"TensorFlow sees {seen} GPUs, this task was given {given}"
    if seen > given:
        return HpcmlError(
            what, origin=origin, fix="set CUDA_VISIBLE_DEVICES to the GPUs of this task, or ask for all that it uses"
        )
    if not built_with_cuda:
        what += "; this TensorFlow is built for CPUs only and cannot see any"
    return HpcmlError(
        what,
        origin=origin,
        allowed="GPUs that were allocated must be used: never a silent run on CPUs",
        fix="pip install 'tensorflow[and-cuda]' into the environment of the job, and check that nvidia-smi lists the "
        "GPUs there; or HPCML_DEVICES=cpu for a rehearsal on virtual CPU devices",
    )
