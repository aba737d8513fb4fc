"""What to ask for next time: requests set beside what was used, each with its numbers and the line for the job file."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..job import clock
from .facts import Report
from .text_of import cores, gib, percent, seconds_text

# A request is called too large above this ratio to what is advised; below it the gain is not worth an edit.
GENEROUS = 1.5
# Room above what was seen: the next run has other data, another seed, another node.
MEMORY_ROOM, CORES_ROOM, TIME_ROOM = 1.25, 1.25, 1.5
LEAST_MEMORY_GIB = 2
LEAST_TIME_S = TIME_STEP_S = 300
# Below this mean utilisation several GPUs have work for fewer; what is left is planned for twice that.
IDLE_GPU, BUSY_GPU = 0.30, 0.60
NEARLY_FULL = 0.95
THROTTLED = 0.05
REHEARSED = "A rehearsal on CPUs: its times and sizes tell nothing about the run on GPUs, so there is no advice."


@dataclass(frozen=True)
class Advice:
    """One thing to change.

    Attributes:
        what: what to do.
        evidence: the numbers that say so.
        lines: lines of the job file that do it; empty where it is not a matter of the job file.
        table: the table of the job file that the lines belong to.
    """

    what: str
    evidence: str
    lines: tuple[str, ...] = ()
    table: str = "resources"


def advice(report: Report) -> list[Advice]:
    """Return what to change next time, the most costly first; empty where the requests fit, or nothing was measured.

    A rehearsal is told nothing: it says which run is no measure for the one on GPUs (``REHEARSED``).
    A run that did not complete may have ended before its peak, so only what it lacked is told of it.
    """
    if report.comparison or report.steps or report.usage.rehearsal:
        return []
    if not report.outcome.completed:
        return list(_lacked(report))
    return [*_gpus(report), *_memory(report), *_cores(report), *_time(report), *_step(report), *_throttling(report)]


def _gpus(report: Report) -> Iterator[Advice]:
    plan, mean, count = report.plan, report.usage.gpu_utilization, report.usage.gpus
    if plan is None or mean is None or count < 2 or mean >= IDLE_GPU or not plan.gpus_per_node:
        return
    wanted = max(1, math.ceil(count * mean / BUSY_GPU))
    nodes = math.ceil(wanted / plan.gpus_per_node)
    one_each = plan.tasks_per_node == plan.gpus_per_node > 1
    per_node = plan.gpus_per_node if nodes > 1 else wanted
    if not one_each:  # tasks must share them evenly
        per_node = math.ceil(per_node / plan.tasks_per_node) * plan.tasks_per_node
    if nodes * per_node >= count:
        return
    lines = [f"nodes = {nodes}"] if nodes != plan.nodes else []
    lines += [f"gpus_per_node = {per_node}"] if per_node != plan.gpus_per_node else []
    lines += [f"tasks_per_node = {per_node}"] if one_each and per_node != plan.gpus_per_node else []
    evidence = f"{count} GPUs were {percent(mean)} busy on average"
    yield Advice("Ask for fewer GPUs, or give them more to do: a larger global batch", evidence, tuple(lines))


def _memory(report: Report) -> Iterator[Advice]:
    asked, peak = report.usage.memory_asked_gib, report.usage.memory_peak_gib
    if asked is None or peak is None:
        return
    wanted = max(LEAST_MEMORY_GIB, math.ceil(peak * MEMORY_ROOM))
    evidence = f"asked {asked} GiB, peak {gib(peak)}"
    if asked > GENEROUS * wanted:
        yield Advice("Ask for less memory", evidence + _capped(report), (f"mem_gb = {wanted}",))
    elif peak > NEARLY_FULL * asked:
        yield Advice("Ask for more memory", f"{evidence}: nearly all of it", (f"mem_gb = {wanted}",))


def _cores(report: Report) -> Iterator[Advice]:
    plan, used = report.plan, report.usage.cores_p95
    if plan is None or used is None or not report.usage.cores_asked:
        return
    wanted = max(1, math.ceil(used / plan.tasks_per_node * CORES_ROOM))
    if plan.cpus_per_task > GENEROUS * wanted:
        per_task = f" in {plan.tasks_per_node} tasks" if plan.tasks_per_node > 1 else ""
        evidence = (
            f"asked {report.usage.cores_asked} cores a node{per_task}, 95 % of the time at most {cores(used)} were busy"
        )
        yield Advice("Ask for fewer cores", evidence + _capped(report), (f"cpus_per_task = {wanted}",))


def _time(report: Report) -> Iterator[Advice]:
    limit, used = report.usage.time_limit_s, report.usage.elapsed_s
    if not limit or used is None:
        return
    wanted = max(LEAST_TIME_S, math.ceil(used * TIME_ROOM / TIME_STEP_S) * TIME_STEP_S)
    if limit > GENEROUS * wanted:
        evidence = f"asked {clock(limit)}, used {seconds_text(used)}; a short job fits into gaps of the queue"
        yield Advice("Ask for less time", evidence + _capped(report), (f'time = "{clock(wanted)}"',))


def _step(report: Report) -> Iterator[Advice]:
    if report.split and report.split.advice and report.split.parts_ms:
        part, ms = max(report.split.parts_ms.items(), key=lambda item: item[1])
        total = report.split.step_ms or sum(report.split.parts_ms.values())
        share = f", {percent(ms / total)} of the step" if total else ""
        took = f"{part.replace('_', ' ')} takes {ms:.1f} ms a step{share}"
        what, _, how = report.split.advice.partition(". ")
        yield Advice(what, f"{how} ({took})" if how else took)


def _throttling(report: Report) -> Iterator[Advice]:
    for gpu in report.gpus:
        if gpu.throttled is not None and gpu.throttled > THROTTLED:
            hot = f" at up to {gpu.temperature_peak_c:.0f} °C" if gpu.temperature_peak_c is not None else ""
            evidence = f"its clock was lowered in {percent(gpu.throttled)} of the samples{hot}"
            yield Advice(f"Tell the cluster's support about GPU {gpu.index} {gpu.uuid}".strip(), evidence)


def _lacked(report: Report) -> Iterator[Advice]:
    plan, state = report.plan, report.outcome.state
    if plan is None:
        return
    if state == "TIMEOUT" and plan.time_s:
        wanted = math.ceil(plan.time_s * 2 / TIME_STEP_S) * TIME_STEP_S
        done = max(report.epochs, default=0)
        total = report.plan.effective_params.get("epochs") if report.plan else None
        far = f"; epoch {done} of {total} was done" if done and isinstance(total, int) else ""
        if done and isinstance(total, int) and total > done and report.usage.elapsed_s:
            needed = report.usage.elapsed_s * total / done * TIME_ROOM
            wanted = math.ceil(needed / TIME_STEP_S) * TIME_STEP_S
        yield Advice(
            "Ask for more time", f"the limit of {clock(plan.time_s)} ended it{far}", (f'time = "{clock(wanted)}"',)
        )
    if state == "OUT_OF_MEMORY" and plan.mem_gb:
        wanted = math.ceil(plan.mem_gb * GENEROUS)
        yield Advice("Ask for more memory", f"{plan.mem_gb} GiB a node were not enough", (f"mem_gb = {wanted}",))


def _capped(report: Report) -> str:
    return "; on this machine requests are upper bounds only" if report.usage.capped else ""
