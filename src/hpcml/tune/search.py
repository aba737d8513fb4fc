"""The search of ``hpcml tune``: which point to try next, when to stop, which point wins. Pure; it measures by a function.

A trial costs a start of the framework, so there can be few: tens, where a grid has hundreds of points.

1. *Coordinate search.* One setting at a time, from the job as it is, in the order of what usually matters most; the best
   value so far is kept (as the first round of Powell 1964, Computer Journal 7, 155). Settings mostly act one by one; those
   that do not are met again in the next round, which goes over the settings that came before one that changed. Along an
   ordered setting the end that is farther from the present value comes first, then the other, then the middle beside the
   best, by halves, as long as that gains.
2. *Racing.* A trial whose best epoch is clearly slower than the best point's speed is ended at once (Maron and Moore 1994,
   Hoeffding Races, NIPS 6; here with a margin instead of an inequality: epochs are few).
3. *Successive halving.* The few best get a longer trial, the job as it is among them (Jamieson and Talwalkar 2016,
   AISTATS, arXiv:1502.07943). The gain is the ratio of these longer trials: the best of many short ones has had luck too.

No surrogate model: Optuna's TPE draws its first ten points at random (``n_startup_trials``), and that is most of a budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .space import Axis, Point, Value, widened

# Below this a change is not worth a line in the job file; two runs of one job differ by about as much.
LEAST_GAIN = 0.01
# A trial is ended when its best epoch is slower than this share of the best speed.
CLEARLY_SLOWER = 0.9
# What a final trial is longer by, and who takes part in it: at most so many, at least this share of the best speed.
LONGER, FINALISTS, NEARLY = 3.0, 2, 0.96
ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """One point, measured.

    Attributes:
        speed: samples/s of the whole job, the median of the epochs after the first; None for a bad point.
        epochs: that were measured; ``trained_s``: the seconds they took.
        wall_s: seconds of the whole trial.
        reason: why it is a bad point, or was ended early.
        cut: whether it was ended because it was clearly slower.
        final: whether it is one of the longer trials at the end.
    """

    number: int
    point: Mapping[str, Value]
    speed: float | None
    epochs: int = 0
    trained_s: float = 0.0
    wall_s: float = 0.0
    reason: str = ""
    cut: bool = False
    final: bool = False


@dataclass(frozen=True)
class Line:
    """The trials along one setting, all others the same: the present value's first."""

    name: str
    trials: tuple[tuple[Value, Trial], ...]

    @property
    def effect(self) -> float:
        """The best speed over the worst, failed trials aside."""
        speeds = [trial.speed for _, trial in self.trials if trial.speed]
        return max(speeds) / min(speeds) if speeds else 1.0


@dataclass
class Found:
    """What a search has come to; it grows while the search goes on.

    Attributes:
        best: the best of the short trials so far.
        winner: of the final trials, where there were any; else ``best``.
        gain: the winner's speed over that of the job as it is.
        confirmed: whether the gain is of the final trials.
        out_of_time: whether the budget ended the search.
    """

    start: Trial
    best: Trial
    winner: Trial
    gain: float = 1.0
    confirmed: bool = False
    out_of_time: bool = False
    trials: list[Trial] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


# (point, final) → a trial, ended early where it is slower than the last argument (samples/s).
Measure = Callable[[Point, bool, float], Trial]


class Search:
    """One search; ``found`` holds what is known at any time, also after an interruption."""

    def __init__(
        self,
        start: Trial,
        axes: Sequence[Axis],
        measure: Measure,
        repaired: Callable[[Point], Point | None],
        left_s: Callable[[], float],
        final_s: float,
    ) -> None:
        """Begin from the job as it is.

        Args:
            repaired: a point with values that go together, None where there is none.
            left_s: seconds of the budget that are left.
            final_s: seconds that a final trial trains longer than others.
        """
        self.axes, self._measure, self._repaired, self._left_s, self._final_s = axes, measure, repaired, left_s, final_s
        self.found = Found(start, start, start, trials=[start])
        self._known: dict[tuple[tuple[str, Value], ...], Trial] = {_key(start.point): start}

    def run(self) -> Found:
        """Search until nothing gains any more or the budget is spent."""
        axes = list(self.axes)
        for _ in range(ROUNDS):
            changed = [number for number, axis in enumerate(axes) if self._along(axis)]
            axes = axes[: max(changed, default=0)]
            if not axes or self.found.out_of_time:
                break
        self._finals()
        return self.found

    def _along(self, axis: Axis) -> bool:
        """Try one setting's values; returns whether another one is the best now."""
        before = self.found.best
        now = before.point[axis.name]
        axis = widened(axis, now)  # a value that was repaired may be none of the axis's own
        tried: dict[int, Trial] = {axis.values.index(now): before}
        for index in Candidates(len(axis.values), tried, all_of_them=not axis.ordered):
            point = self._repaired({**before.point, axis.name: axis.values[index]})
            if point is None or point[axis.name] != axis.values[index]:
                tried[index] = Trial(0, before.point, None)  # does not go together with the rest
                continue
            trial = self._try(point)
            if trial is None:
                break
            tried[index] = trial
        told = ((axis.values[index], trial) for index, trial in tried.items() if trial.number)
        self.found.lines.append(Line(axis.name, tuple(told)))
        best = max(tried.values(), key=_speed)
        if _speed(best) > _speed(before) * (1 + LEAST_GAIN):
            self.found.best = self.found.winner = best
            self.found.gain = _speed(best) / _speed(self.found.start)
        return self.found.best is not before

    def _try(self, point: Point) -> Trial | None:
        """Return a point's trial; None where the budget has no room for one more and for the final ones."""
        if known := self._known.get(_key(point)):
            return known
        usual_s = self._usual_s()
        if self._left_s() < usual_s + 2 * (usual_s + self._final_s):  # the job as it is and the best
            self.found.out_of_time = True
            return None
        trial = self._measure(point, False, CLEARLY_SLOWER * max(map(_speed, self.found.trials)))
        self.found.trials.append(trial)
        self._known[_key(point)] = trial
        return trial

    def _usual_s(self) -> float:
        """Seconds of a whole trial; the first read everything from a cold disk, and a failed one is short."""
        return max([t.wall_s for t in self.found.trials[1:] if t.speed] or [self.found.start.wall_s])

    def _finals(self) -> None:
        """Measure the best and the job as it is once more, for longer."""
        found = self.found
        if found.best is found.start:
            return
        enough = NEARLY * _speed(found.best)
        others = [t for t in found.trials if t not in (found.best, found.start) and not t.cut and _speed(t) >= enough]
        finalists = [found.best, *sorted(others, key=_speed, reverse=True)][:FINALISTS]
        # The job as it is comes second, so that what drifts favours neither side.
        order = [finalists[0].point, found.start.point, *(trial.point for trial in finalists[1:])]
        usual_s = self._usual_s()
        while len(order) > 1 and self._left_s() < len(order) * (usual_s + self._final_s):
            order.pop()
        if len(order) < 2:
            return
        finals = []
        for point in order:
            finals.append(self._measure(point, True, 0.0))
            found.trials.append(finals[-1])
        start = finals.pop(1)
        winner = max(finals, key=_speed)
        if start.speed and winner.speed:
            found.gain, found.confirmed = winner.speed / start.speed, True
            found.winner = winner if found.gain > 1 + LEAST_GAIN else found.start


class Candidates:
    """Iterates over the indices to try next; looks at ``tried``, which its reader fills."""

    def __init__(self, count: int, tried: dict[int, Trial], *, all_of_them: bool = False) -> None:
        self._count, self._tried, self._all = count, tried, all_of_them
        self._best_speed = -1.0
        self._halving = False

    def __iter__(self) -> "Candidates":
        return self

    def __next__(self) -> int:
        """Return an index.

        Raises:
            StopIteration: no further value promises anything.
        """
        index = next((i for i in range(self._count) if i not in self._tried), None) if self._all else self._ordered()
        if index is None:
            raise StopIteration
        return index

    def _ordered(self) -> int | None:
        now = next(iter(self._tried))
        for end in sorted((0, self._count - 1), key=lambda end: -abs(end - now)):
            if end not in self._tried:
                return end
        best = max(self._tried, key=lambda index: _speed(self._tried[index]))
        speed = _speed(self._tried[best])
        if self._halving and speed <= self._best_speed * (1 + LEAST_GAIN):
            return None  # the last half gained nothing
        self._halving, self._best_speed = True, speed
        gaps = [_middle(best, other) for other in _neighbours(best, self._tried)]
        gaps = [index for index in gaps if index not in self._tried]
        return max(gaps, key=lambda index: abs(index - best), default=None)


def _neighbours(index: int, tried: Mapping[int, Trial]) -> list[int]:
    """The nearest tried values on either side."""
    below, above = [i for i in tried if i < index], [i for i in tried if i > index]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _middle(near: int, far: int) -> int:
    """The index half way between two, rounded towards the first."""
    return near + int((far - near) / 2)


def _key(point: Point) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted(point.items()))


def _speed(trial: Trial) -> float:
    return trial.speed or 0.0
