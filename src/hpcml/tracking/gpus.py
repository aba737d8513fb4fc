"""What NVML tells of a job's GPUs (docs.nvidia.com/deploy/nvml-api), each quantity only where it exists."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .visible import Seen, choose, listed

MIB = 2**20
# Clocks held down by something that is wrong: heat or supply (nvmlClocksEventReasons). Idle, application clocks, sync
# boost and the software power cap, under which a busy GPU works by design, are no fault.
THROTTLE = {0x40: "hardware, heat", 0x80: "external power brake", 0x20: "software, heat", 0x08: "hardware slowdown"}
# NVML return codes: this driver or GPU will never tell; the GPU is gone.
_NEVER = {2, 3, 4, 13, 25, 26}  # invalid argument, not supported, no permission, no function, version, deprecated
_GONE = {1, 9, 15, 16, 18}  # uninitialized, driver not loaded, lost, reset required, driver replaced
_NVLINK = {
    "nvlink_tx": 138,
    "nvlink_rx": 139,
}  # NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _RX: KiB since the driver's start
_ALL_LINKS = 0xFFFFFFFF

Values = dict[str, float]
Owns = Callable[[int], bool | None]
Probe = Callable[["Gpu", float], Values]  # the second: monotonic seconds


@dataclass
class Gpu:
    """One of the job's GPUs or MIG instances.

    Attributes:
        label: ``gpu`` and its number among the job's on this node.
        uuid: its own, a MIG instance's where it is one.
        facts: what doesn't change.
        probes: the readings that this driver and GPU have; one that turns out not to exist is taken out.
        in_turn: those too slow for every sample.
        others: pids and MiB of processes that aren't the job's, where they can be seen.
        energy_j: used since the first reading, where ``has_energy``.
        reasons: the bits of THROTTLE that hold the clocks down now.
    """

    label: str
    uuid: str
    handle: Any
    facts: Mapping[str, Any]
    probes: list[Probe]
    in_turn: list[Probe] = field(default_factory=list)
    others: dict[int, float] = field(default_factory=dict)
    reasons: int = 0
    lost: bool = False
    energy_j: float = 0.0
    has_energy: bool = False
    _counters: dict[str, tuple[float, float]] = field(default_factory=dict)

    def rate(self, name: str, now: float, count: float) -> float | None:
        """Return a counter's growth a second since the last reading; None at the first, or where it began anew."""
        then, before = self._counters.get(name, (now, count))
        self._counters[name] = (now, count)
        return (count - before) / (now - then) if now > then and count >= before else None

    def growth(self, name: str, count: float) -> float:
        """Return a counter's growth since the last reading."""
        before = self._counters.get(name, (0.0, count))[1]
        self._counters[name] = (0.0, count)
        return max(0.0, count - before)

    def add_power(self, now: float, power_w: float) -> None:
        """Integrate power over time, by trapezoids, for a GPU without a counter of energy."""
        then, before = self._counters.get("power", (now, power_w))
        self._counters["power"] = (now, power_w)
        self.energy_j += (now - then) * (power_w + before) / 2


class Gpus:
    """The job's GPUs, read through NVML.

    Args:
        names: as in CUDA_VISIBLE_DEVICES.
        slurm_ids: see ``visible.choose``.
        first: number of the first of them on this node.
        owns: tells whether a process is the job's, None where unknown.
        say: takes a warning for people.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        pynvml.NVMLError: there is no driver, or it doesn't answer.
    """

    def __init__(
        self, names: Sequence[str], slurm_ids: Sequence[str], first: int, owns: Owns, say: Callable[[str], None]
    ) -> None:
        import pynvml

        self.nvml = pynvml
        self._owns, self._say = owns, say
        self._told: set[tuple[str, str]] = set()
        self._turn = 0
        pynvml.nvmlInit()
        self.driver = str(pynvml.nvmlSystemGetDriverVersion())
        self.gpus: list[Gpu] = []
        for number, (name, one) in enumerate(zip(names, choose(names, listed(pynvml), slurm_ids), strict=True), first):
            if one is None:
                say(f"GPU {name} of CUDA_VISIBLE_DEVICES is not among those that the driver shows; it is not watched")
                continue
            self.gpus.append(self._gpu(f"gpu{number}", one))

    def facts(self) -> dict[str, Any]:
        """Return what doesn't change: names, UUIDs, memory in MiB, the driver's version."""
        return {f"{g.label}.{k}": v for g in self.gpus for k, v in g.facts.items()} | {"driver": self.driver}

    def read(self, now: float) -> Values:
        """Return the values of all GPUs; what one of them doesn't have is left out.

        Args:
            now: monotonic seconds.
        """
        values: Values = {}
        alive = [gpu for gpu in self.gpus if not gpu.lost]
        for gpu in alive:
            mine = self._read(gpu, now, gpu.probes)
            if "power_w" in mine and self._energy not in gpu.probes:
                gpu.add_power(now, mine["power_w"])
            if "power_w" in mine or "energy_j" in mine:
                gpu.has_energy, mine["energy_j"] = True, gpu.energy_j
            values |= {f"{gpu.label}/{name}": value for name, value in mine.items()}
        if alive:
            # NVML counts PCIe traffic over 20 ms, in which the call waits: one GPU at each sample, in turn.
            gpu = alive[self._turn % len(alive)]
            self._turn += 1
            values |= {f"{gpu.label}/{name}": value for name, value in self._read(gpu, now, gpu.in_turn).items()}
        return values

    def close(self) -> None:
        """Let go of the driver."""
        with contextlib.suppress(self.nvml.NVMLError):
            self.nvml.nvmlShutdown()

    def _read(self, gpu: Gpu, now: float, probes: list[Probe]) -> Values:
        values: Values = {}
        for probe in tuple(probes):
            if gpu.lost:
                break
            try:
                values |= probe(gpu, now)
            except self.nvml.NVMLError as error:
                code = error.value
                if code in _GONE:
                    gpu.lost = True
                    self._once(gpu, "lost", f"the driver has lost it ({error}); it is not watched any more")
                elif code in _NEVER:
                    probes.remove(probe)
                else:
                    self._once(gpu, str(code), f"the driver gives an error ({error}); values are missing")
        return values

    def _once(self, gpu: Gpu, cause: str, text: str) -> None:
        if (gpu.label, cause) not in self._told:
            self._told.add((gpu.label, cause))
            self._say(f"{gpu.label} ({gpu.uuid}): {text}")

    def _gpu(self, label: str, one: Seen) -> Gpu:
        nvml = self.nvml
        facts: dict[str, Any] = {"uuid": one.uuid, **({"mig": one.parent} if one.parent else {})}
        if one.handle is None:
            self._say(f"{label}: the driver can't open it; it is not watched")
            return Gpu(label, one.uuid, None, facts, [], lost=True)
        with contextlib.suppress(nvml.NVMLError):
            facts["name"] = str(nvml.nvmlDeviceGetName(one.handle))
        with contextlib.suppress(nvml.NVMLError):
            facts["memory_mib"] = nvml.nvmlDeviceGetMemoryInfo(one.handle).total // MIB
        gpu = Gpu(label, one.uuid, one.handle, facts, [self._memory, self._processes])
        if not one.parent:  # an instance has no sensors of its own, and its GPU's tell of the neighbours too
            gpu.probes += [*self._sensors(), self._clock_reasons, self._energy, self._nvlink]
            gpu.in_turn += [
                _simple(
                    "pcie_rx_mib_s", lambda h: nvml.nvmlDeviceGetPcieThroughput(h, nvml.NVML_PCIE_UTIL_RX_BYTES) / 1024
                ),
                _simple(
                    "pcie_tx_mib_s", lambda h: nvml.nvmlDeviceGetPcieThroughput(h, nvml.NVML_PCIE_UTIL_TX_BYTES) / 1024
                ),
            ]
        return gpu

    def _sensors(self) -> list[Probe]:
        nvml = self.nvml
        return [
            _simple("utilization_percent", lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu),
            _simple("power_w", lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000),
            _simple("temperature_c", lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
            _simple("sm_clock_mhz", lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
            _simple("memory_clock_mhz", lambda h: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM)),
        ]

    def _memory(self, gpu: Gpu, now: float) -> Values:
        nvml = self.nvml
        try:  # the second version leaves out what the driver keeps for itself
            used = nvml.nvmlDeviceGetMemoryInfo(gpu.handle, version=nvml.nvmlMemory_v2).used
        except nvml.NVMLError as error:
            if error.value not in _NEVER:
                raise
            used = nvml.nvmlDeviceGetMemoryInfo(gpu.handle).used
        return {"memory_used_mib": used // MIB}

    def _processes(self, gpu: Gpu, now: float) -> Values:
        """Memory by owner; all or nothing, since a part would look like the whole."""
        gpu.others = {}
        ours = others = 0.0
        processes = self.nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle)
        if not processes and self._owns(0) is None:  # process ids mean nothing here: the driver may hide some
            return {}
        for process in processes:
            owned = self._owns(process.pid)
            if owned is None or process.usedGpuMemory is None:
                gpu.others = {}
                return {}
            if owned:
                ours += process.usedGpuMemory / MIB
            else:
                others += process.usedGpuMemory / MIB
                gpu.others[process.pid] = process.usedGpuMemory / MIB
        return {"memory_ours_mib": ours, "memory_others_mib": others}

    def _clock_reasons(self, gpu: Gpu, now: float) -> Values:
        gpu.reasons = 0
        gpu.reasons = self._reasons(gpu.handle) & sum(THROTTLE)
        return {"throttled": int(gpu.reasons != 0)}

    def _reasons(self, handle: Any) -> int:
        nvml = self.nvml
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except nvml.NVMLError as error:  # the name before driver 535
            if error.value not in _NEVER:
                raise
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    def _energy(self, gpu: Gpu, now: float) -> Values:
        millijoules = self.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
        gpu.energy_j += gpu.growth("energy", millijoules / 1000)
        return {"energy_j": gpu.energy_j}

    def _nvlink(self, gpu: Gpu, now: float) -> Values:
        values: Values = {}
        fields = self.nvml.nvmlDeviceGetFieldValues(gpu.handle, [(number, _ALL_LINKS) for number in _NVLINK.values()])
        for name, one in zip(_NVLINK, fields, strict=True):
            if one.nvmlReturn == 0 and (kib_s := gpu.rate(name, now, one.value.ullVal)) is not None:
                values[f"{name}_mib_s"] = kib_s / 1024
        if all(one.nvmlReturn in _NEVER for one in fields):
            raise self.nvml.NVMLError(self.nvml.NVML_ERROR_NOT_SUPPORTED)
        return values


def _simple(name: str, ask: Callable[[Any], float]) -> Probe:
    return lambda gpu, now: {name: ask(gpu.handle)}
