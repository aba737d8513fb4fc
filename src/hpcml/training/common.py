"""What all frameworks' trainings have in common: what was given to a process, and how an epoch is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import HpcmlError
from ..tracking.journal import Journal

_HEADLINES = ("val_accuracy", "accuracy", "val_loss", "loss")


@dataclass(frozen=True)
class Expected:
    """What this process was given, and so what the framework must use.

    Attributes:
        strategy: such as ``mirrored``.
        world: tasks of the job.
        gpus_per_task: GPUs given to this task.
        virtual: whether this is a rehearsal on virtual CPU devices.
        virtual_devices: logical CPU devices of this task in a rehearsal.
    """

    strategy: str
    world: int = 1
    gpus_per_task: int = 0
    virtual: bool = False
    virtual_devices: int = 1

    @property
    def devices(self) -> int:
        """Devices of this task, at least the CPU."""
        return max(1, self.virtual_devices if self.virtual else self.gpus_per_task)


def expected(strategy: str | None, world: int, gpus: int, virtual: int) -> Expected:
    """Return what a task was given.

    Args:
        world: tasks of the job.
        gpus: of this task; 0 is a rehearsal.
        virtual: logical CPU devices that stand in for them.

    Raises:
        HpcmlError: there is no strategy.
    """
    if strategy is None:
        raise HpcmlError("the run was begun without a strategy", fix='hpcml.begin(strategy="original")')
    return Expected(strategy, world, gpus, virtual=not gpus, virtual_devices=max(1, virtual))


def tell_epoch(journal: Journal, epoch: int, epochs: int, values: Mapping[str, Any]) -> None:
    """Record the progress of a training, with the number that matters most among an epoch's."""
    headline = next((f" {name} {float(values[name]):.3f}" for name in _HEADLINES if name in values), "")
    journal.write("progress", done=epoch, total=epochs, unit="epoch", text=f"epoch {epoch}/{epochs}{headline}")


def length(loader: Any) -> int | None:
    """Return a loader's batches an epoch; None where it can't tell: a DataLoader over a stream has a length that raises."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
