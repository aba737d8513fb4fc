"""What a chain of steps is, as frozen data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..job import Job

# What a step can do instead of running work of its own.
ACTIONS = ("fetch", "register", "report")
# How a result is better.
DIRECTIONS = ("higher", "lower")
CHAMPION = "champion"


@dataclass(frozen=True)
class Registration:
    """What ``action = "register"`` decides by.

    Attributes:
        model: name of the registered model.
        trained_by: the step that saved the model (``run.log_model``).
        evaluated_by: the step that wrote ``artifacts/evaluation.json``.
        metric: the value in it that counts.
        better: whether a ``higher`` or a ``lower`` value is better.
        alias: the name in the registry of the promoted version.
    """

    model: str
    trained_by: str
    evaluated_by: str
    metric: str = "accuracy"
    better: str = "higher"
    alias: str = CHAMPION


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        needs: the steps that must have completed before.
        job: what it runs and needs; of an action only its site, queue and data count.
        action: one of ``ACTIONS``, None where the job's own work is done.
        registration: only of ``register``.
    """

    name: str
    needs: tuple[str, ...]
    job: Job
    action: str | None = None
    registration: Registration | None = None


@dataclass(frozen=True)
class Pipeline:
    """A chain: its steps in an order in which each comes after those that it needs.

    Attributes:
        path: the file that it was read from.
        job: what the steps share, as a job without work.
    """

    name: str
    project: Path
    path: Path
    job: Job
    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def step(self, name: str) -> Step:
        """Return a step by its name."""
        return next(step for step in self.steps if step.name == name)

    def before(self, names: Sequence[str]) -> set[str]:
        """Return all steps that some need, directly or not."""
        found: set[str] = set()
        waiting = [need for name in names for need in self.step(name).needs]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.step(name).needs
        return found

    def after(self, name: str) -> set[str]:
        """Return all steps that need one, directly or not."""
        return {step.name for step in self.steps if name in self.before([step.name])}
