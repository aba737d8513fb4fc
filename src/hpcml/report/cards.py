"""The key figures and the tables of a report as text; the terminal and the page show the same."""

import time
from dataclasses import dataclass

from ..job import clock
from .comparison import percent_text, replicas_text, speedup_text
from .facts import Report
from .text_of import MISSING, cores, energy, gib, hours, number, percent, seconds_text

# Slurm's reasons for waiting (squeue(1), JOB REASON CODES) in plain words; others are told as they are.
WAITS = {
    "Resources": "the nodes it asked for were taken",
    "Priority": "jobs of higher priority were first",
    "Dependency": "it waited for another job",
    "BeginTime": "it was not to start before its time",
    "JobHeldUser": "it was held by its user",
    "JobHeldAdmin": "it was held by an administrator",
    "Licenses": "it waited for a licence",
    "Reservation": "it waited for its reservation",
    "ReqNodeNotAvail": "a node it asked for was not available",
    "PartitionDown": "its partition was down",
    "PartitionTimeLimit": "its time limit is longer than the partition's",
    "QOSMaxJobsPerUserLimit": "your running jobs were as many as the QOS allows",
    "QOSMaxGRESPerUser": "your GPUs in use were as many as the QOS allows",
    "QOSMaxCpuPerUserLimit": "your cores in use were as many as the QOS allows",
    "AssocGrpGRES": "the GPUs in use of your account were as many as it may have",
    "AssocGrpCpuLimit": "the cores in use of your account were as many as it may have",
    "AssocMaxJobsLimit": "your running jobs were as many as your account allows",
}


@dataclass(frozen=True)
class Card:
    """One key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Use:
    """One resource: asked for, used, and used over asked (None where either is unknown)."""

    what: str
    asked: str
    used: str
    share: float | None = None


def cards(report: Report) -> list[Card]:
    """Return the key figures that are known, the most telling first."""
    m, usage = report.measured, report.usage
    found = [Card("Duration", seconds_text(usage.elapsed_s), _when(report))]
    if m.samples_per_s is not None:
        found.append(Card("Throughput", f"{number(m.samples_per_s)}/s", _speed_note(report)))
    if m.accuracy is not None:
        note = "validation, last epoch" if m.validated else "training data, last epoch"
        found.append(Card("Accuracy", percent_text(m.accuracy, 2), note))
    if report.comparison:
        found += _best(report)
    if m.replicas is not None:
        found.append(Card("Replicas in sync", replicas_text(m), "virtual CPU devices" if m.virtual else ""))
    if usage.gpu_utilization is not None:
        found.append(Card("GPU utilisation", percent(usage.gpu_utilization), f"mean of {_gpu_count(report)}"))
    if usage.gpus and usage.gpu_hours is not None:
        busy = f"{hours(usage.gpu_hours_busy)} busy" if usage.gpu_hours_busy is not None else ""
        found.append(Card("GPU-hours", hours(usage.gpu_hours), busy))
    if usage.energy_wh is not None:
        estimated = any(gpu.energy_from == "power" for gpu in report.gpus)
        found.append(
            Card("GPU energy", energy(usage.energy_wh), "mean power × time" if estimated else "the GPUs' own counter")
        )
    if usage.memory_peak_gib is not None:
        of = f"of {usage.memory_asked_gib} GiB asked" if usage.memory_asked_gib else ""
        found.append(Card("Peak memory", gib(usage.memory_peak_gib), of))
    if report.queue.waited_s is not None:
        found.append(Card("In the queue", seconds_text(report.queue.waited_s), wait_text(report)))
    if not any(card.label in ("Throughput", "Accuracy", "Fastest") for card in found):
        found += [Card(s.name, number(s.last), "last value") for s in report.metrics if s.rank == 0][:3]
    return found


def uses(report: Report) -> list[Use]:
    """Return what was asked for beside what was used; a node's share where the resource is a node's."""
    u = report.usage
    found = []
    if u.time_limit_s or u.elapsed_s is not None:
        asked = clock(u.time_limit_s) if u.time_limit_s else MISSING
        found.append(Use("Time", asked, seconds_text(u.elapsed_s), _share(u.elapsed_s, u.time_limit_s)))
    if u.cores_asked:
        used = f"{cores(u.cores_mean)} busy on average, {cores(u.cores_p95)} at the 95th percentile"
        used = MISSING if u.cores_mean is None else used
        found.append(Use("Cores a node", str(u.cores_asked), used, _share(u.cores_mean, u.cores_asked)))
    if u.memory_asked_gib or u.memory_peak_gib is not None:
        asked = f"{u.memory_asked_gib} GiB" if u.memory_asked_gib else MISSING
        used = MISSING if u.memory_peak_gib is None else f"{gib(u.memory_peak_gib)} peak"
        found.append(Use("Memory a node", asked, used, _share(u.memory_peak_gib, u.memory_asked_gib)))
    if u.gpus_asked or u.gpus:
        used = MISSING if u.gpu_utilization is None else f"{percent(u.gpu_utilization)} busy on average"
        if u.rehearsal:
            used = "none here, CPUs rehearsed" if u.capped else f"{u.gpus_asked} given, none used: CPUs rehearsed"
        elif u.gpus != u.gpus_asked:
            used = f"{u.gpus} given" + ("" if u.gpu_utilization is None else f", {used}")
        found.append(Use("GPUs", str(u.gpus_asked or 0), used, u.gpu_utilization))
    return found


def split_note(report: Report) -> str:
    """Return which steps were profiled, and why a step takes another time there than by the epochs."""
    split, by_epochs = report.split, report.measured.step_time_ms
    if split is None:
        return ""
    which = f"Steps {split.first} to {split.last}" if split.first is not None else "Some steps"
    if split.step_ms is None:
        return f"{which} were profiled."
    said = f"{which} were profiled: {number(split.step_ms)} ms a step, with what the profiler itself costs."
    if by_epochs is not None:
        without = f", which leave out {_count(split.left_out, 'step')} for it" if split.left_out else ""
        said += f" By the epochs{without}, a step takes {number(by_epochs)} ms."
    return said


def wait_text(report: Report) -> str:
    """Return why the run waited, in words; empty where it never was in a queue."""
    if report.queue.waited_s is None:
        return ""
    reasons = dict.fromkeys(wait.reason for wait in report.queue.waits)
    words = [WAITS.get(reason.partition(",")[0].strip(), reason) for reason in reasons]
    return "; ".join(words) if words else "the reason was not recorded"


def lead(report: Report) -> list[str]:
    """Return what ran, where, and how it ended where it did not complete; one line each."""
    plan = report.plan
    what = {"notebook": "Notebook", "script": "Script", "command": "Command", "function": "Function"}
    words = [f"{what.get(report.work, report.work.capitalize())} {report.target}".strip()]
    if report.measured.strategy:
        words.append(f"strategy {report.measured.strategy}")
    if report.comparison:
        words = [f"Comparison of {', '.join(row.measured.name for row in report.comparison.rows)}"]
    if report.steps:
        words = [f"Chain of {', '.join(step.name for step in report.steps)}"]
    place = [f"site {plan.site}"] if plan else []
    if report.hosts:
        shown = ", ".join(report.hosts[:4]) + (f" and {len(report.hosts) - 4} more" if len(report.hosts) > 4 else "")
        place.append(f"on {shown}")
    if plan:
        nodes, tasks = _count(plan.nodes, "node"), _count(plan.tasks, "task")
        of = "" if report.comparison or report.steps else f", {tasks} of {_count(plan.cpus_per_task, 'core')}"
        place.append(nodes + of)
    names = list(dict.fromkeys(gpu.name for gpu in report.gpus if gpu.name))
    if names:
        place.append(f"{len(report.gpus)} × {', '.join(names)}")
    if report.queue.slurm_job_id:
        place.append(f"Slurm job {report.queue.slurm_job_id}")
    lines = [" · ".join(words), *([" · ".join(place)] if place else [])]
    outcome = report.outcome
    if report.failed:
        lines += [f"{one.name} {one.outcome.state}: {one.measured.error}" for one in report.failed]
    elif not outcome.completed and outcome.reason:
        code = f" (exit code {outcome.exit_code})" if outcome.exit_code else ""
        rank = f"rank {outcome.failed_rank}: " if outcome.failed_rank is not None and report.ranks > 1 else ""
        lines.append(f"{rank}{outcome.reason}{code}")
    if outcome.restarts:
        lines.append(f"restart {outcome.restarts}: the job was queued again; what was before is not shown")
    return lines


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _best(report: Report) -> list[Card]:
    assert report.comparison
    ended = [row for row in report.comparison.rows if row.measured.state == "COMPLETED"]
    rows = [row for row in ended if row.measured.samples_per_s is not None]
    if not rows:
        return []
    best = max(rows, key=lambda row: row.measured.samples_per_s or 0)
    found = [Card("Fastest", best.measured.name, f"{number(best.measured.samples_per_s)} samples/s")]
    if best.speedup is not None and best.measured.name != report.comparison.baseline:
        note = f"over {report.comparison.baseline}"
        if not report.comparison.rehearsal:
            found.append(Card("Speed-up", speedup_text(best.speedup), note))
    if (
        not report.comparison.rehearsal
        and best.efficiency is not None
        and best.measured.name != report.comparison.baseline
    ):
        found.append(Card("Efficiency", percent(best.efficiency), "speed-up over the ratio of replicas"))
    return found


def _speed_note(report: Report) -> str:
    m = report.measured
    counted = sum(epoch.samples_per_s is not None for epoch in m.epochs)
    which = "the one epoch" if counted == 1 else "median of the epochs after the first"
    step = f"; {number(m.step_time_ms)} ms a step" if m.step_time_ms is not None else ""
    return f"samples, {which}{step}"


def _when(report: Report) -> str:
    started = report.outcome.started
    return "" if started is None else time.strftime("from %Y-%m-%d %H:%M:%S", time.localtime(started))


def _gpu_count(report: Report) -> str:
    return "1 GPU" if len(report.gpus) == 1 else f"{len(report.gpus)} GPUs"


def _share(used: float | None, asked: float | None) -> float | None:
    return used / asked if used is not None and asked else None
