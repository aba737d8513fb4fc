"""Why a training is slower on several devices than on one, in numbers, and the batch at which that turns.

The model, for a step with a global batch of b samples on n devices that each compute b/n of them:

    t₁(b) = a + c·b          tₙ(b) = a + c·b/n + r

a is what a step costs whatever the batch (launching, Python), c the devices' computing for a sample, r what sharing adds:
the all-reduce, which moves as many bytes as the model has gradients (2(n-1)/n of them a device: Patarasuk and Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002), and launching on n devices. None of a and r depends on b, as in the iteration model of Shi,
Wang and Chu (arXiv:1711.05979). Both curves cross at b* = r / (c·(1 - 1/n)); with the times measured at b that is

    b* = b + (tₙ(b) - t₁(b)) / (c·(1 - 1/n))

so that only c must come from a profile. As b grows, more of the all-reduce hides behind the computing, so that b* is
rather too large than too small. It holds where computing on devices is what is shared: not for virtual CPU devices.
"""

import math
from dataclasses import dataclass

from .records import Records
from .text_of import number

# Of a device's computing; below that, two profiles of about ten steps can't tell half a batch from a whole one.
LEAST_CHANGE = 0.1
PROFILE = "--set 'profile.steps=[10, 20]'"


@dataclass(frozen=True)
class Parts:
    """A step as the profile split it, means in ms; the parts that are not named here are input and idle time."""

    step_ms: float
    host_ms: float
    compute_ms: float
    communication_ms: float


def parts_of(found: Records) -> Parts | None:
    """Return the last profile's split of a step; None without one, or where it saw no work of a device."""
    told = [record["split"] for record in found.of_kind("profile") if isinstance(record.get("split"), dict)]
    if not told:
        return None
    names = ("step_ms", "host_ms", "device_compute_ms", "communication_ms")
    values = [told[-1].get(name) for name in names]
    known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v) and v >= 0]
    return Parts(*known) if len(known) == len(names) and known[2] > 0 else None


@dataclass(frozen=True)
class Shared:
    """A step that n devices share, beside the same step on one.

    Attributes:
        batch: global batch, in samples, of both.
        devices: n, two or more.
        alone_ms, shared_ms: a step on one device and on n.
        alone, shared: their profiles, None where none was made.
        other: the framework of the one device where it is another than that of the n; empty where it is the same.
    """

    batch: int
    devices: int
    alone_ms: float
    shared_ms: float
    alone: Parts | None = None
    shared: Parts | None = None
    other: str = ""

    @property
    def compute_ms_per_sample(self) -> float | None:
        """c: from both profiles, which computed b and b/n samples on a device; None where the two hardly differ.

        With one profile its computing over its samples, which is too large by what computing costs whatever the batch.
        """
        alone = None if self.other else self.alone
        if alone and self.shared:
            change = alone.compute_ms - self.shared.compute_ms
            return change / self._spared if change > LEAST_CHANGE * alone.compute_ms else None
        if alone:
            return alone.compute_ms / self.batch
        return self.shared.compute_ms * self.devices / self.batch if self.shared else None

    @property
    def exact(self) -> bool:
        """Whether c comes from two profiles, else it is a bound."""
        return bool(self.alone and self.shared and not self.other)

    @property
    def crossing(self) -> float | None:
        """b*: the global batch at which n devices are as fast as one of the same framework; a lower bound unless ``exact``.

        Without any profile c is at most t₁/b, and from it follows a lower bound, too; where the one device ran another
        framework, r is the profile's all-reduce. None where nothing can be said.
        """
        share = 1 - 1 / self.devices
        c = self.compute_ms_per_sample
        if self.other:
            return self.shared.communication_ms / (c * share) if self.shared and c else None
        if c is None and not self.alone and not self.shared:
            c = self.alone_ms / self.batch
        return self.batch + (self.shared_ms - self.alone_ms) / (c * share) if c else None

    @property
    def _spared(self) -> float:
        """Samples of a batch that a device needn't compute since others do."""
        return self.batch * (1 - 1 / self.devices)


def explain(name: str, speedup: str, step: Shared) -> str:
    """Return in words how much slower a variant is on its devices, what its step is made of, and what would change it."""
    gpus, parts = f"{step.devices} GPUs", step.shared
    of = ""
    if parts:
        of = f" (profiled: {number_of(parts.step_ms)} ms, of which {number_of(parts.communication_ms)} all-reduce and "
        of += f"{number_of(parts.host_ms)} host and launching)"
    whose = f" with {step.other}" if step.other else ""
    text = f"{name}: {gpus} are {speedup}: a step takes {number_of(step.shared_ms)} ms{of}; on one GPU{whose} it takes "
    return f"{text}{number_of(step.alone_ms)} ms. {_when(step, gpus)}"


def _when(step: Shared, gpus: str) -> str:
    """What batch would change it, as far as what was measured tells."""
    at = step.crossing
    if at is None and step.other:
        return f"What batch would change it can't be told across frameworks without a profile: {PROFILE}."
    if at is None and step.exact:
        assert step.alone and step.shared
        few = step.batch // step.devices
        told = f"{number_of(step.alone.compute_ms)} ms for {step.batch:,} samples, {number_of(step.shared.compute_ms)}"
        return (
            f"A GPU computes {told} for {few:,}: too few to fill it. Compare at a batch that does, such as "
            f"-p global_batch={16 * step.batch}."
        )
    assert at is not None
    if step.other and at <= step.batch:
        return "Its all-reduce costs less than the computing that it spares may: the difference can be the framework's."
    if step.exact:
        return f"From about global_batch = {rounded(at, step.devices):,} on, {gpus} would pay."
    than = " against one with the same framework" if step.other else ""
    bound = f"{gpus} will hardly pay{than} below about global_batch = {max(rounded(at), step.batch):,}"
    if step.other:
        return f"{bound}, by its own profile."
    if step.alone or step.shared:
        return f"{bound}, by the one profile; with profiles of both more can be told: {PROFILE}."
    return f"No profile tells where the time goes; by the step times alone {bound}. To know more: {PROFILE}."


def number_of(ms: float) -> str:
    """Milliseconds with three digits: a median of epochs tells no more."""
    return number(float(f"{ms:.3g}"))


def rounded(batch: float, multiple: int = 0) -> int:
    """Return a batch with two digits, which is what the model can tell: a bound down, else up to a multiple of devices."""
    unit = int(10 ** max(0, math.floor(math.log10(batch)) - 1))
    if not multiple:
        return math.floor(batch / unit) * unit
    return math.ceil(math.ceil(batch / unit) * unit / multiple) * multiple
