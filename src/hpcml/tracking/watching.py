"""What telemetry makes of its samples: totals at the end, and warnings while something can still be done."""

import os
from collections.abc import Callable, Sequence

from .gpus import THROTTLE, Gpu, Values
from .host import MIB, Usage

# A rate over less is noise: proc(5) counts CPU in ticks of 10 ms.
RATE_S = 0.2
# Below this a GPU does next to nothing; the driver itself makes a percent or two.
IDLE_PERCENT = 5
# Longer than what lies between two spells of training takes: a validation on the CPU, a checkpoint, tracing a graph.
IDLE_S = 60
# Shorter spells of heat come and go with the fans.
THROTTLED_S = 10
# More than what monitoring and a display server take of a GPU, in MiB.
FOREIGN_MIB = 256
# So near its limit a job is ended by one more allocation.
MEMORY_SHARE = 0.95

_MEANS = {"utilization_percent": "utilization_mean_percent", "power_w": "power_mean_w"}
_PEAKS = {"memory_used_mib": "memory_peak_mib", "memory_ours_mib": "memory_ours_peak_mib"}
_COUNTS = {"cpu/cores": "cpu/core_seconds", "io/read_mib_s": "io/read_mib", "io/write_mib_s": "io/write_mib"}
# The values of a GPU that matter here.
WATCHED = (*_MEANS, *_PEAKS, "throttled", "memory_others_mib")


class Totals:
    """Sums, means and peaks over all samples, and the host's rates from one sample to the next."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._samples = 0
        self._began: float | None = None
        self._ended = 0.0
        self._last: dict[str, float] = {}
        self._grown: dict[str, float] = {}
        self._anchors: dict[str, tuple[float, float]] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._peaks: dict[str, float] = {}
        self._throttled_s: dict[str, float] = {}

    def host(self, now: float, usage: Usage) -> Values:
        """Return the host's values of a sample; a rate is that since the last sample."""
        values: Values = {}
        read, written = (None if count is None else count / MIB for count in (usage.read, usage.written))
        for name, count in zip(_COUNTS, (usage.core_s, read, written), strict=True):
            if count is None:
                continue
            # A process that nobody waits for takes its counts with it.
            grown = self._grown.get(name, 0.0) + max(0.0, count - self._last.get(name, count))
            self._last[name], self._grown[name] = count, grown
            then, before = self._anchors.setdefault(name, (now, grown))
            if now - then >= RATE_S:
                values[name] = (grown - before) / (now - then)
                self._anchors[name] = (now, grown)
        if usage.used is not None and usage.peak is not None:
            values |= {"memory/used_mib": usage.used / MIB, "memory/peak_mib": usage.peak / MIB}
        if usage.processes is not None:
            values["processes/count"] = usage.processes
        return values

    def gpu(self, now: float, label: str, values: Values) -> None:
        """Take in one GPU's values of a sample."""
        for name, total in _MEANS.items():
            if name in values:
                former, count = self._sums.get(f"{label}/{total}", (0.0, 0))
                self._sums[f"{label}/{total}"] = (former + values[name], count + 1)
        for name, total in _PEAKS.items():
            if name in values:
                self._peaks[f"{label}/{total}"] = max(values[name], self._peaks.get(f"{label}/{total}", 0.0))
        if "throttled" in values:
            since = now - self._ended if self._samples else 0.0
            key = f"{label}/throttled_s"
            self._throttled_s[key] = self._throttled_s.get(key, 0.0) + since * values["throttled"]

    def sampled(self, now: float) -> None:
        """Note that a sample is done."""
        self._samples += 1
        self._began = now if self._began is None else self._began
        self._ended = now

    def values(self, gpus: Sequence[Gpu], peak: int | None) -> Values:
        """Return the totals.

        Args:
            gpus: for their energy.
            peak: of memory in bytes; None where it was not watched.
        """
        totals: Values = {_COUNTS[name]: grown for name, grown in self._grown.items()}
        totals |= {name: former / count for name, (former, count) in self._sums.items()}
        totals |= {**self._peaks, **self._throttled_s}
        totals |= {f"{gpu.label}/energy_j": gpu.energy_j for gpu in gpus if gpu.has_energy}
        if peak is not None:
            totals["memory/peak_mib"] = peak / MIB
        totals["telemetry/seconds"] = self._ended - (self._began or self._ended)
        totals |= {"telemetry/samples": self._samples, "telemetry/cpu_seconds": self.cpu_s}
        return {name: round(value, 3) for name, value in totals.items()}


class Warnings:
    """Tells people what is wrong, each thing once for each GPU and cause.

    Args:
        say: takes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told: set[tuple[str, str]] = set()
        self._since: dict[tuple[str, str], float] = {}
        self._before: dict[str, Values] = {}

    def gpu(self, now: float, gpu: Gpu, values: Values) -> None:
        """Look at one GPU's values of a sample.

        Args:
            now: monotonic seconds.
        """
        if gpu.lost:
            return
        if gpu.label not in self._before:
            self._before[gpu.label] = values
            self._foreign(gpu, values)
        self._idle(now, gpu, values)
        for bit, cause in THROTTLE.items():
            if self._lasts(now, gpu, cause, bool(gpu.reasons & bit), THROTTLED_S):
                text = f"its clocks have been held down for {THROTTLED_S} s ({cause}); tell the administrators"
                self._once(gpu, cause, text)

    def memory(self, usage: Usage, limit: int | None) -> None:
        """Look at the job's memory on this node."""
        if limit and usage.used is not None and usage.used >= MEMORY_SHARE * limit and ("", "memory") not in self._told:
            self._told.add(("", "memory"))
            self._say(
                f"the job uses {usage.used / MIB:,.0f} of its {limit / MIB:,.0f} MiB of memory on {_node()}; past that "
                "it is killed: ask for more (resources.mem_gb), or load less at once"
            )

    def _foreign(self, gpu: Gpu, values: Values) -> None:
        """At the start, before the work has taken any: what is in use is somebody else's."""
        taken = values.get("memory_others_mib", values.get("memory_used_mib", 0.0))
        if taken >= FOREIGN_MIB:
            pids = ", ".join(map(str, sorted(gpu.others)))
            whose = f"by other processes (pid {pids})" if pids else "by processes that can't be seen from here"
            self._once(gpu, "foreign", f"{taken:,.0f} MiB of its memory were in use at the start {whose}")

    def _idle(self, now: float, gpu: Gpu, values: Values) -> None:
        before = self._before[gpu.label]
        held = values.get("memory_ours_mib")
        if held is None:  # unknown owners: what came since the start is ours, if it is more than others' noise
            held = values.get("memory_used_mib", 0.0) - before.get("memory_used_mib", 0.0)
            held = held if held >= FOREIGN_MIB else 0.0
        idle = held > 0 and values.get("utilization_percent", 100) < IDLE_PERCENT
        if self._lasts(now, gpu, "idle", idle, IDLE_S):
            self._once(
                gpu,
                "idle",
                f"idle for {IDLE_S} s (utilisation below {IDLE_PERCENT} %) while the job holds {held:,.0f} MiB of it; "
                "does the work use it, or wait for its input?",
            )

    def _lasts(self, now: float, gpu: Gpu, what: str, is_so: bool, seconds: float) -> bool:
        """Whether something has been so at each sample for some time."""
        if not is_so:
            self._since.pop((gpu.label, what), None)
            return False
        return now - self._since.setdefault((gpu.label, what), now) >= seconds

    def _once(self, gpu: Gpu, cause: str, text: str) -> None:
        if (gpu.label, cause) not in self._told:
            self._told.add((gpu.label, cause))
            self._say(f"{gpu.label} on {_node()} ({gpu.uuid}): {text}")


def _node() -> str:
    return os.uname().nodename
