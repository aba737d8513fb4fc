"""torch, thinly: the device and threads before it starts, a check that the ranks train together, numbers into the journal.

The process group, ``DistributedDataParallel`` and the loop stay in the notebook as plain PyTorch; this module counts its
steps and compares the ranks. torch is imported inside the functions.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import HpcmlError, Stopped
from ..tracking import heartbeat
from ..tracking.journal import Journal
from .checkpoint import Place
from .common import Expected, length, tell_epoch
from .ddp import DDP, Ranks, Stop, check_batch, check_loader, raise_unless_same, same_weights

if TYPE_CHECKING:
    import torch

    from . import torch_checkpoint, torch_profile

Batch = TypeVar("Batch")

# The weights are compared after these steps: gradients that are not averaged differ at once, those that are averaged
# only at some steps (no_sync, accumulation) by the tenth. The end of the first epoch is the third time.
CHECKED_STEPS = (1, 10)


def choose_device(expected: Expected, seen: int, *, built_with_cuda: bool = True) -> str:
    """Return the name of this rank's device: ``cuda:0`` or ``cpu``.

    ``begin`` has cut CUDA_VISIBLE_DEVICES down to this task's own GPU, so it is number 0, whether or not cgroups hide
    the other tasks' GPUs; the local rank doesn't count.

    Args:
        seen: GPUs that torch sees.

    Raises:
        HpcmlError: torch doesn't see the GPU that was given, or one process was given several.
    """
    if expected.virtual or not expected.gpus_per_task:
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    origin = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "CUDA_VISIBLE_DEVICES is not set"
    if expected.gpus_per_task > 1:
        raise HpcmlError(
            f"this process was given {expected.gpus_per_task} GPUs, but {_named(expected)} takes one process for each",
            origin=origin,
            fix="as many tasks as GPUs: tasks_per_node = gpus_per_node in the job, srun --ntasks-per-node=…, or torchrun "
            "--nproc-per-node=…",
        )
    if seen == 1:
        return "cuda:0"
    what = f"torch sees {seen} GPUs, this task was given 1"
    if seen > 1:
        raise HpcmlError(what, origin=origin, fix="leave CUDA_VISIBLE_DEVICES as hpcml.begin() set it")
    if not built_with_cuda:
        what += "; this torch is built for CPUs only and cannot see any"
    raise HpcmlError(
        what,
        origin=origin,
        allowed="GPUs that were allocated must be used: never a silent run on CPUs",
        fix="pip install -r envs/torch/requirements.txt into the environment of the job, and check that nvidia-smi lists "
        "the GPU there; or HPCML_DEVICES=cpu for a rehearsal on CPUs",
    )


def device(expected: Expected) -> "torch.device":
    """Return this rank's device; see ``choose_device``."""
    import torch

    return torch.device(choose_device(expected, torch.cuda.device_count(), built_with_cuda=_with_cuda()))


def configure(expected: Expected, threads: Mapping[str, str]) -> "torch.device":
    """Give torch its threads and make this rank's device the current one; returns it.

    Args:
        threads: ``OMP_NUM_THREADS`` and ``TF_NUM_INTEROP_THREADS`` as decided for this task: within an operation, and
            operations at once.

    Raises:
        HpcmlError: torch is not installed, or the device can't be had.
    """
    try:
        import torch
    except ImportError as error:
        fix = "pip install -r envs/torch/requirements.txt into the environment of the job"
        raise HpcmlError(f'strategy "ddp" needs torch: {error}', fix=fix) from None
    torch.set_num_threads(int(threads["OMP_NUM_THREADS"].split(",")[0]))
    torch.set_num_interop_threads(int(threads["TF_NUM_INTEROP_THREADS"]))
    chosen = device(expected)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # NCCL and a bare .cuda() take the current one
    return chosen


class Training:
    """The epochs and steps of one training loop: checks first, then counts and keeps times.

    Attributes:
        samples_per_s: of the whole job, for each epoch so far.
        stop: whether it was asked to stop.
    """

    def __init__(
        self,
        journal: Journal,
        expected: Expected,
        place: "torch.device",
        *,
        model: "torch.nn.Module",
        epochs: int,
        global_batch: int,
        began: float,
        rank: int,
        stop: Stop,
        logged: Callable[[], Mapping[str, Any]] = dict,
        profile: tuple[int, int] | None = None,
        folder: Path | None = None,
        ranks: Ranks = DDP,
        keeper: "torch_checkpoint.Keeper | None" = None,
    ) -> None:
        """Check what can be known before the first step.

        Args:
            began: ``time.perf_counter()`` when the run began.
            logged: returns the metrics that the notebook logged last.
            profile: first and last step to profile on rank 0, from 1 over the whole training; moved where it lies
                outside. Steps of a profile are left out of the speed, except where they are all of an epoch.
            folder: for the profile; without it there is none.
            ranks: how the ranks talk to one another.
            keeper: of checkpoints; without it a training that is stopped just ends early.

        Raises:
            HpcmlError: this is no training by all ranks together, or the global batch can't be shared by them.
        """
        ranks.check(expected, model)
        check_batch(global_batch, expected.world)
        self._journal, self._expected, self._place = journal, expected, place
        self._model, self._epochs, self._global_batch = model, epochs, global_batch
        self._began, self._rank, self._logged, self._ranks = began, rank, logged, ranks
        self._step = self._epoch = 0
        self._keeper, self._resumed = keeper, Place()
        self._loaders_checked = False
        # Steps and seconds that are not recorded yet, and how much of each the speed leaves out.
        self._trained = (0, 0.0, 0, 0.0)
        self._profile = None
        if profile is not None and folder is not None:
            from . import torch_profile

            self._profile = torch_profile.window(journal, profile, folder, place, rank=rank, virtual=expected.virtual)
        self.stop = stop
        self.samples_per_s: list[float] = []
        if rank == 0 and expected.virtual:
            for text in advice(expected):
                self._say("warning", text)

    def epochs(self) -> Iterator[int]:
        """Yield the epochs' numbers, from 1; fewer where all ranks agreed to stop, or a checkpoint has some of them."""
        with heartbeat.training():
            if self._keeper is None:
                yield from self._epochs_to_come()
                return
            self._resume(self._keeper)
            with self._keeper.heeding():
                yield from self._epochs_to_come()

    def _epochs_to_come(self) -> Iterator[int]:
        for epoch in range(self._resumed.epoch + 1, self._epochs + 1):
            self._epoch = epoch
            yield epoch
            self._record()
            if epoch == 1 and self._step and self._step not in CHECKED_STEPS:
                self._compare()
            if self._keeper is not None and epoch < self._epochs:
                self._keeper.end_epoch(Place(self._step, epoch))
            if self._rank == 0:
                tell_epoch(self._journal, epoch, self._epochs, self._logged())
            if self.stop.agreed:
                return

    def _resume(self, keeper: "torch_checkpoint.Keeper") -> None:
        self._resumed = keeper.resume()
        self._step = self._resumed.step
        if self._step:
            self._compare()  # what each rank has loaded
            if self._rank == 0:
                self._say("info", f"goes on from {self._resumed}{keeper.otherwise}")

    def _save(self, keeper: "torch_checkpoint.Keeper", done: int) -> float:
        """Save within an epoch, all ranks together; returns the seconds that it took."""
        self._synchronize()
        heartbeat.pause()
        began = time.perf_counter()
        keeper.save(Place(self._step, self._epoch - 1, done))
        return time.perf_counter() - began

    def _stop(self, keeper: "torch_checkpoint.Keeper", done: int) -> NoReturn:
        """Save and leave the work, all ranks together; what comes after the loop is for a training that has ended."""
        place = Place(self._step, self._epoch - 1, done)
        heartbeat.pause()
        kept = f"a checkpoint is kept at {place}" if keeper.save(place) else "the checkpoint before is kept"
        text = f"stopped by {self.stop.signal} after step {self._step}; {kept}"
        self._say("info", text)
        raise Stopped(text)

    def steps(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield a loader's batches; a step is over when the next batch is asked for.

        Raises:
            HpcmlError: the ranks' weights differ, or the loaders don't fit the job.
        """
        if not self._loaders_checked:
            self._check_loaders(loader)
        self._synchronize()
        skipped = self._resumed.batch if self._epoch == self._resumed.epoch + 1 else 0
        last = length(loader)
        if self._keeper is not None:
            loader = self._keeper.batches(loader, skipped)
        began, compared_s, inside_s, done = time.perf_counter(), 0.0, 0.0, 0
        watched = self._watched(loader)
        try:
            for batch in loader if watched is None else watched:
                yield batch
                self._step, done = self._step + 1, done + 1
                heartbeat.step(self._step)
                if watched is not None:
                    watched.ended()
                if self._step - self._resumed.step in CHECKED_STEPS:
                    compared_s += (took_s := self._compare())
                    inside_s += took_s if watched is not None and watched.running else 0.0
                due = self._keeper is not None and skipped + done != last and self._keeper.due()
                if self.stop.asked(due):
                    if self._keeper is not None:
                        self._stop(self._keeper, skipped + done)
                    if self._rank == 0:
                        self._say(
                            "info", f"stopped after step {self._step}, in epoch {self._epoch}: {self.stop.signal}"
                        )
                    break
                if self.stop.granted and self._keeper is not None:
                    compared_s += (took_s := self._save(self._keeper, skipped + done))
                    inside_s += took_s if watched is not None and watched.running else 0.0
            self._synchronize()
        finally:  # a loop that is left by break has had these steps too; epochs() records them
            heartbeat.pause()
            left_out, left_out_s = watched.end_epoch() if watched is not None else (0, 0.0)
            trained_s = time.perf_counter() - began - compared_s
            self._trained = done, trained_s, left_out, left_out_s - inside_s
        self._record()

    def _watched(self, loader: Iterable[Batch]) -> "torch_profile.Steps[Batch] | None":
        """Return the loader under the profile where that may begin in this epoch; else the loop stays as it is."""
        to_come = self._epochs - max(1, self._epoch) + 1
        if self._profile is None or not self._profile.begin_epoch(length(loader), to_come):
            return None
        from . import torch_profile

        return torch_profile.Steps(loader, self._profile)

    def _record(self) -> None:
        """Keep the speed of the steps since the last time; the first epoch holds the warm-up."""
        (steps, trained_s, left_out, left_out_s), self._trained = self._trained, (0, 0.0, 0, 0.0)
        if not steps or trained_s <= 0:
            return
        values = {"epoch_time_s": trained_s}
        if left_out:
            values["profiled_steps"] = left_out
            if left_out < steps:
                steps, trained_s = steps - left_out, trained_s - left_out_s
        speed = steps * self._global_batch / trained_s
        self.samples_per_s.append(speed)
        self._journal.metric(self._epoch, {**values, "samples_per_s": speed, "step_time_ms": 1000 * trained_s / steps})

    def _compare(self) -> float:
        """Compare the ranks' weights; returns the seconds that it took."""
        self._synchronize()
        began = time.perf_counter()
        if self._step == CHECKED_STEPS[0]:
            self._journal.metric(0, {"time_to_first_step_s": began - self._began})
        same = same_weights(self._model, told_by=self._ranks.gather)
        if self._step in (CHECKED_STEPS[0], self._resumed.step):
            self._journal.write(
                "replicas",
                in_sync=same.count(same[self._rank]),
                expected=self._expected.world,
                devices=["GPU:0" if self._place.type == "cuda" else "CPU:0"],  # as TensorFlow names them
                virtual=self._expected.virtual,
            )
        raise_unless_same(same, self._step, self._ranks.strategy, self._ranks.fix)
        return time.perf_counter() - began

    def _check_loaders(self, loader: Any) -> None:
        warning = check_loader(loader, self._global_batch, self._expected.world)
        if warning and self._rank == 0:
            self._say("warning", warning)
        steps = length(loader)
        counts = [one for (one,) in self._ranks.gather([-1 if steps is None else steps])]
        if len(set(counts)) > 1:
            fix = "DistributedSampler, or drop_last=True in the DataLoader"
            raise HpcmlError(f"the ranks have {counts} batches an epoch; they would wait for each other", fix=fix)
        self._loaders_checked = True

    def _synchronize(self) -> None:
        """Wait for the GPU: torch returns as soon as the work is queued."""
        if self._place.type == "cuda":
            import torch

            torch.cuda.synchronize(self._place)

    def _say(self, level: str, text: str) -> None:
        self._journal.message(level, text)
        print(f"hpcml: {text}", file=sys.stderr if level == "warning" else sys.stdout, flush=True)


def advice(expected: Expected) -> list[str]:
    """Return what a person should know about a rehearsal on CPUs."""
    told = []
    if expected.world == 1 and expected.virtual_devices > 1:
        told.append(f"{_named(expected)} has one replica for each process: to rehearse two, run two tasks")
    if expected.world > 1:
        told.append("ranks on CPUs share this machine's cores: they show that it works, not how fast; no speed-up")
    return told


def _named(expected: Expected) -> str:
    return "Horovod" if expected.strategy == "horovod" else "DistributedDataParallel"


def _with_cuda() -> bool:
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None
