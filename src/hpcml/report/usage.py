"""What a run asked for and what it used of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plan import Plan
from .records import Records
from .series import Series

_GPU = re.compile(r"gpu(\d+)[/.](.+)")
_MIB_IN_GIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One GPU over the whole run; None where its driver or board doesn't tell.

    Attributes:
        utilization: mean fraction (0 to 1) of time in which a kernel ran.
        memory_peak_mib: with other people's processes; ``memory_ours_mib`` the run's own.
        throttled: fraction of the samples with a lowered clock.
        energy_j: joules; ``energy_from`` is ``counter``, or ``power`` for mean power × time.
    """

    rank: int
    index: int
    name: str = ""
    uuid: str = ""
    memory_mib: float | None = None
    utilization: float | None = None
    memory_peak_mib: float | None = None
    memory_ours_mib: float | None = None
    power_mean_w: float | None = None
    temperature_peak_c: float | None = None
    throttled: float | None = None
    energy_j: float | None = None
    energy_from: str = ""


@dataclass(frozen=True)
class Usage:
    """Asked for and used, of the whole run where the name does not say otherwise.

    Attributes:
        capped: whether the requests were upper bounds only, capped to the machine (site ``local``).
        rehearsal: whether CPUs stood in for the GPUs that were asked for, so that nothing here tells of those.
        cores_p95: cores of a node that were busy, 95th percentile; ``cores_mean`` likewise.
        memory_peak_gib: of the node that used most.
        gpu_hours: GPUs times hours; 0 without GPUs, None while the time is unknown.
        gpu_hours_busy: that part of them in which a kernel ran.
        energy_wh: of all GPUs that told it.
    """

    capped: bool = False
    rehearsal: bool = False
    elapsed_s: float | None = None
    time_limit_s: int | None = None
    cores_asked: int | None = None
    cores_mean: float | None = None
    cores_p95: float | None = None
    memory_asked_gib: int | None = None
    memory_peak_gib: float | None = None
    gpus_asked: int | None = None
    gpus: int = 0
    gpu_utilization: float | None = None
    gpu_memory_peak_gib: float | None = None
    gpu_hours: float | None = None
    gpu_hours_busy: float | None = None
    energy_wh: float | None = None


def gpus_of(found: Records, telemetry: Sequence[Series], elapsed_s: float | None) -> tuple[Gpu, ...]:
    """Return the GPUs that the telemetry saw; one that several ranks saw is told once, by the first."""
    by_gpu: dict[tuple[int, int], dict[str, Series]] = {}
    for series in telemetry:
        if match := _GPU.fullmatch(series.name):
            by_gpu.setdefault((series.rank, int(match[1])), {})[match[2]] = series
    seen: set[str] = set()
    gpus = []
    for (rank, index), of in sorted(by_gpu.items()):
        params = found.params.get(rank, {})
        uuid = str(params.get(f"gpu{index}.uuid") or "")
        if uuid and uuid in seen:
            continue
        seen.add(uuid)
        gpus.append(_gpu(rank, index, uuid, of, found, elapsed_s))
    return tuple(gpus)


def _gpu(rank: int, index: int, uuid: str, of: Mapping[str, Series], found: Records, elapsed_s: float | None) -> Gpu:
    params = found.params.get(rank, {})
    memory = params.get(f"gpu{index}.memory_mib")
    utilization, power = _mean(of.get("utilization_percent")), _mean(of.get("power_w"))
    counted = found.totals.get((rank, f"gpu{index}/energy_j"), _high(of.get("energy_j")))
    estimated = power * elapsed_s if power is not None and elapsed_s is not None else None
    return Gpu(
        rank=rank,
        index=index,
        name=str(params.get(f"gpu{index}.name") or ""),
        uuid=uuid,
        memory_mib=float(memory) if isinstance(memory, int | float) else None,
        utilization=None if utilization is None else utilization / 100,
        memory_peak_mib=found.totals.get((rank, f"gpu{index}/memory_peak_mib"), _high(of.get("memory_used_mib"))),
        memory_ours_mib=found.totals.get((rank, f"gpu{index}/memory_ours_peak_mib"), _high(of.get("memory_ours_mib"))),
        power_mean_w=power,
        temperature_peak_c=_high(of.get("temperature_c")),
        throttled=_mean(of.get("throttled")),
        energy_j=counted if counted is not None else estimated,
        energy_from="counter" if counted is not None else "power" if estimated is not None else "",
    )


def usage_of(
    plan: Plan | None,
    elapsed_s: float | None,
    virtual: bool,
    found: Records,
    telemetry: Sequence[Series],
    gpus: Sequence[Gpu],
) -> Usage:
    """Set what was asked for beside what was used."""
    local = plan is not None and plan.scheduler == "local"
    cores = [series for series in telemetry if series.name == "cpu/cores"]
    peaks = [series.high for series in telemetry if series.name in ("memory/peak_mib", "memory/used_mib")]
    peaks += [value for (_, name), value in found.totals.items() if name == "memory/peak_mib"]
    peak = max((value for value in peaks if value is not None), default=None)
    utilizations = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    utilization = sum(utilizations) / len(utilizations) if utilizations else None
    gpu_peak = max((gpu.memory_peak_mib for gpu in gpus if gpu.memory_peak_mib is not None), default=None)
    asked = plan.nodes * plan.gpus_per_node if plan else None
    # On a cluster what is allocated is charged; elsewhere a GPU that was asked for may not be there.
    held = asked if asked is not None and not local and not virtual else _given(found, gpus)
    hours = None if elapsed_s is None else held * elapsed_s / 3600
    energies = [gpu.energy_j for gpu in gpus if gpu.energy_j is not None]
    p95 = [series.p95 for series in cores if series.p95 is not None]
    means = [series.mean for series in cores if series.mean is not None]
    return Usage(
        capped=local,
        rehearsal=bool(asked) and (virtual or any(p.get("virtual_cpu_devices") for p in found.params.values())),
        elapsed_s=elapsed_s,
        time_limit_s=(plan.time_s or None) if plan else None,
        cores_asked=plan.tasks_per_node * plan.cpus_per_task if plan else None,
        cores_mean=max(means, default=None),
        cores_p95=max(p95, default=None),
        memory_asked_gib=plan.mem_gb if plan else None,
        memory_peak_gib=None if peak is None else peak / _MIB_IN_GIB,
        gpus_asked=asked,
        gpus=held,
        gpu_utilization=utilization,
        gpu_memory_peak_gib=None if gpu_peak is None else gpu_peak / _MIB_IN_GIB,
        gpu_hours=hours,
        gpu_hours_busy=None if hours is None or utilization is None else hours * utilization,
        energy_wh=sum(energies) / 3600 if energies else None,
    )


def _given(found: Records, gpus: Sequence[Gpu]) -> int:
    """GPUs that the ranks say they were given; where none says, those that the telemetry saw."""
    told = [str(params["gpus"]) for params in found.params.values() if params.get("gpus") is not None]
    return sum(len([word for word in text.split(",") if word]) for text in told) if told else len(gpus)


def _mean(series: Series | None) -> float | None:
    return series.mean if series else None


def _high(series: Series | None) -> float | None:
    return series.high if series else None
