"""torch's profiler over a window of ``run.steps``, written as a trace that Chrome, Perfetto and TensorBoard open.

Imported only by a training that asks for a profile; outside the window no profiler exists. torch is imported inside the
functions.
"""

import contextlib
import gc
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..tracking.journal import Journal
from .profile import ProfiledSteps, Profiler, only_clock

if TYPE_CHECKING:
    import torch

Batch = TypeVar("Batch")

# The name by which torch's own tools find the steps: torch.profiler.profile.step() opens such a span. It counts from 0;
# here the number is the training's, from 1.
STEP = "ProfilerStep#"
# Around the call for the next batch, whatever the loader is; torch marks its own DataLoader only.
INPUT = "hpcml.input"
# Key in the trace of the steps that came to their end: one that waited for a batch which never came has a span too.
STEPS = "hpcml_steps"
# TensorBoard's plugin takes "<worker>.pt.trace.json.gz" in any folder for a trace (torch.profiler.tensorboard_trace_handler).
TRACE = "rank0.pt.trace.json.gz"
_ONE = "only one can: leave [profile] out of the job, or the other out of the work"


def window(
    journal: Journal, asked: tuple[int, int], folder: Path, place: "torch.device", *, rank: int, virtual: bool
) -> ProfiledSteps:
    """Return the profile of some steps of a training: rank 0 records, the others leave the same steps out of their speed.

    Args:
        asked: first and last step, from 1 over the whole training.
        folder: the profile's, in the run's own.
        place: the rank's device.
        virtual: whether that is a CPU that stands in for a GPU.
    """
    tool = _profiler(folder, place) if rank == 0 else only_clock(lambda result: _wait(place))
    return ProfiledSteps(journal, asked, tool, rank=rank, virtual=virtual, framework="torch")


class Steps(Iterable[Batch]):
    """A loader's batches, each asked for inside its own step. Call ``ended`` when a batch is trained."""

    def __init__(self, loader: Iterable[Batch], profile: ProfiledSteps) -> None:
        self._loader, self._profile = loader, profile

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)  # before the first step: here a DataLoader starts its workers
        while True:
            try:
                batch = self._next(batches)
            except StopIteration:
                return
            yield batch

    def _next(self, batches: Iterator[Batch]) -> Batch:
        import torch

        if self._profile.over and not self._profile.running:
            return next(batches)
        self._profile.begin_call()
        try:
            if not self._profile.running:
                return next(batches)
            with torch.profiler.record_function(INPUT):
                return next(batches)
        except BaseException:
            self._profile.drop_call()
            raise

    @property
    def running(self) -> bool:
        """Whether the profiler runs."""
        return self._profile.running

    def ended(self) -> None:
        """Note that the last batch is trained: what comes until the next is asked for is no part of a step."""
        self._profile.end_call(True)

    def end_epoch(self) -> tuple[int, float]:
        """End a profile with its epoch; returns the steps and seconds of the epoch that its speed leaves out."""
        self._profile.end_epoch()
        return self._profile.left_out_steps, self._profile.left_out_s


class _Mark(contextlib.AbstractContextManager[None]):
    """The span of a step; keeps its number where the step came to its end."""

    def __init__(self, step: int, ended: list[int]) -> None:
        import torch

        self._step, self._ended = step, ended
        self._span = torch.profiler.record_function(f"{STEP}{step}")

    def __enter__(self) -> None:
        self._span.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._span.__exit__(None, None, None)
        if kind is None:
            self._ended.append(self._step)


def _profiler(folder: Path, place: "torch.device") -> Profiler:
    """torch's profiler of operations and, on a GPU, of its kernels and copies; no stacks, shapes or memory: they cost more."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    running: list[torch.profiler.profile] = []
    others: list[torch.autograd.profiler.profile] = []
    ended: list[int] = []

    def start() -> None:
        if torch.autograd._profiler_enabled():  # a second one starts without a word, and the first then crashes
            raise RuntimeError(f"another profiler of torch runs; {_ONE}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ended.clear()
        others[:] = _open()  # that nobody ever stopped; none of them records
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        try:  # what the profiler (and CUPTI) sets up at the first operation took 4 ms: not in the first step
            torch.ones(1, device=place).sum()
            _wait(place)
        except BaseException:
            profiler.stop()
            raise
        running.append(profiler)

    def stop() -> Path | None:
        profiler = running.pop()
        # A thread has one session, which a later profiler takes over without a word and whichever ends first takes away;
        # torch 2.13 crashes where the other is stopped and exported then.
        later = [one for one in _open() if one is not profiler.profiler and not any(one is other for other in others)]
        if later or not torch.autograd._profiler_enabled():
            raise RuntimeError(f"another profiler of torch was started within the window; {_ONE}")
        try:
            profiler.add_metadata_json(STEPS, str(ended))
        finally:
            profiler.stop()
        return _export(profiler, folder).relative_to(folder.parent) if ended else None

    return Profiler(start, stop, lambda step: _Mark(step, ended), lambda result: _wait(place))


def _open() -> "list[torch.autograd.profiler.profile]":
    """The profilers of this process that were started and not stopped."""
    import torch

    made = [one for one in gc.get_objects() if type(one) is torch.autograd.profiler.profile]
    return [one for one in made if one.entered and one.kineto_results is None]


def _export(profiler: "torch.profiler.profile", folder: Path) -> Path:
    """Write the trace into a folder of its own, named by the time, and return that; a torn one doesn't stay."""
    now = time.time()
    session = folder / f"{time.strftime('%Y_%m_%d_%H_%M_%S', time.localtime(now))}_{int(1000 * now) % 1000:03d}"
    session.mkdir(mode=0o700)
    part = session / f".part.{TRACE}"
    try:
        profiler.export_chrome_trace(str(part))  # by its name it is compressed
        part.rename(session / TRACE)
    except BaseException:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            session.rmdir()
        raise
    return session


def _wait(place: "torch.device") -> None:
    """Wait for the GPU: torch returns as soon as the work is queued."""
    if place.type == "cuda":
        import torch

        torch.cuda.synchronize(place)
