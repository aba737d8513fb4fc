"""A look at a run as lines of text for a terminal of any size."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..queue.watch import Curve, Gpu, Look
from .draw import UNICODE, Glyphs, bar, sparkline
from .show import COLOURS, duration

if TYPE_CHECKING:
    from rich.text import Text

LABEL = 10
LOG_LINES = 5
# A sampler writes each second; nothing for so long is worth saying.
STALE_S = 15
_CURVES = ("loss", "val_loss", "accuracy", "val_accuracy")
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Page:
    """How much room there is; ``height`` is None where lines cost nothing."""

    width: int
    height: int | None
    glyphs: Glyphs = UNICODE


def lines(look: Look, page: Page, now: float | None = None) -> "list[Text]":
    """Return a run's view, no more lines than the page has: what says least goes first.

    Args:
        now: seconds since the epoch; by default the clock's.
    """
    now = time.time() if now is None else now
    active = _active(look)
    head = [*_head(look, now), *_progress(look, page)]
    below = _below(look, page)
    curves = _curves(active, page)
    rate = _rate(active)
    gpus = _gpus(active, page, now)
    host = _host(active, page)
    warnings = [_row("warning", text, "yellow") for text in _all_warnings(look)]
    log = [_text(f"  {line}") for _, line in active.lines]
    most = page.height
    if most is None:
        log, most = log[-LOG_LINES:], 10_000
    room = max(0, most - len(head) - len(rate) - len(host) - 1)  # a heading above the log
    kept_warnings, room = _take(warnings[::-1], min(3, room), room)
    wanted_log = min(LOG_LINES, len(log))
    kept_below, room = _fit(below, max(1, room - wanted_log - 4), room, "runs", page)
    kept_gpus, room = _fit(gpus, max(1, room - wanted_log - min(2, len(curves))), room, "GPUs", page)
    kept_curves, room = _take(curves, max(1, room - wanted_log), room)
    kept_log = log[-room:] if room > 0 else []
    title = [_text(_log_title(look, active), "dim")] if kept_log else []
    shown = [*head, *kept_below, *kept_curves, *rate, *kept_gpus, *host, *kept_warnings[::-1], *title, *kept_log]
    for line in shown:
        line.truncate(page.width, overflow="ellipsis" if page.glyphs is UNICODE else "crop")
    return shown[:most]


def _active(look: Look) -> Look:
    """Whose curves and GPUs are shown: the run itself, or the variant of a comparison that was busy last."""
    busy = [one for one in look.below if one.curves or one.gpus or one.lines or one.progress]
    running = [one for one in busy if one.state.name == "RUNNING"]
    return (running or busy or [look])[-1] if not (look.curves or look.gpus or look.lines) else look


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(_CONTROL.sub("", text.expandtabs()), style=style, no_wrap=True)


def _row(label: str, text: str, style: str = "") -> "Text":
    return _label(label).append_text(_text(text, style))


def _label(text: str, width: int = LABEL) -> "Text":
    return _text("").append(f"{text:<{width}}", "dim")


def _take(lines: "list[Text]", most: int, room: int) -> "tuple[list[Text], int]":
    kept = lines[: max(0, min(most, room))]
    return kept, room - len(kept)


def _fit(lines: "list[Text]", most: int, room: int, noun: str, page: Page) -> "tuple[list[Text], int]":
    """As ``_take``, with a last line that says how many are not shown."""
    most = max(0, min(most, room))
    if len(lines) <= most or most == 0:
        return _take(lines, most, room)
    kept = [*lines[: most - 1], _text(f"{page.glyphs.rest} and {len(lines) - most + 1} more {noun}", "dim")]
    return kept, room - len(kept)


def _head(look: Look, now: float) -> "list[Text]":
    state, asked = look.state, look.request
    first = _text(state.name, f"bold {COLOURS.get(state.name, 'red')}")
    job = f"job {state.slurm_job_id}" if state.slurm_job_id else ""
    size = f"{asked.nodes} node{'s' * (asked.nodes > 1)}" + (
        f", {asked.gpus} GPU{'s' * (asked.gpus > 1)}" if asked.gpus else ""
    )
    words = [state.run_id, job, asked.strategy or "", size]
    first.append_text(_text(" " + " · ".join(word for word in words if word)))
    rows = [first]
    if not state.is_final and state.started is None and state.submitted:
        rows.append(_row("waits", _waiting(look, now)))
    elif state.started:
        rows.append(_row("time", _elapsed(look, now)))
    if state.reason and not rows[-1].plain.endswith(state.reason):
        rows.append(_row("reason", state.reason, "red" if state.is_final else "yellow"))
    return rows[:2] if rows[-1].plain.startswith("waits") else rows


def _waiting(look: Look, now: float) -> str:
    state = look.state
    text = duration(max(0.0, now - (state.submitted or now)))
    if state.expected_start:
        left = state.expected_start - now
        when = time.strftime("%H:%M" if left < 86_400 else "%Y-%m-%d %H:%M", time.localtime(state.expected_start))
        text += f" · Slurm expects to start it at {when}" + (f", in {duration(left)}" if left > 0 else "")
    return text + (f" · {state.reason}" if state.reason else "")


def _elapsed(look: Look, now: float) -> str:
    took = max(0.0, (look.state.ended or now) - (look.state.started or now))
    limit = look.request.time_s
    return duration(took) + (f" of {duration(limit)} ({min(took / limit, 9.99):.0%})" if limit else "")


def _progress(look: Look, page: Page) -> "list[Text]":
    rows = []
    for unit in sorted(look.progress):
        record = look.progress[unit]
        done, total = record["done"], record["total"]
        inside = unit == "cell" and done < total  # a cell is told by its number, an epoch by those that are done
        count, text = f" {done + inside}/{total}", str(record.get("text") or "")
        drawn = bar(done / total if total else 0.0, max(8, min(30, page.width - 50)), page.glyphs)
        rows.append(_row(f"{unit}s", f"{drawn}{count}  {text}".rstrip()))
    return rows


def _curves(look: Look, page: Page) -> "list[Text]":
    known = look.curves
    names = [name for name in _CURVES if name in known] or [n for n in known if "/" not in n and not _is_rate(n)][:4]
    label = max([LABEL, *(len(name) + 2 for name in names)])
    # The most telling first: where there is no room the others go.
    rows = []
    for name in sorted(names, key=lambda name: name not in ("loss", "accuracy")):
        curve = known[name]
        values = [value for _, value in curve.points]
        line = _label(name, label)
        drawn = sparkline(values, page.width - label - 24, page.glyphs.blocks)
        line.append_text(_text(drawn, "cyan")).append(f" {_short(curve.last)}{_best(name, curve)}")
        rows.append(line)
    return rows


def _is_rate(name: str) -> bool:
    return name in ("samples_per_s", "step_time_ms", "epoch_time_s", "time_to_first_step_s", "lr")


def _best(name: str, curve: Curve) -> str:
    finite = [value for _, value in curve.points if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    return f" (min {_short(min(finite))})" if "loss" in name else f" (max {_short(max(finite))})"


def _rate(look: Look) -> "list[Text]":
    last = {name: curve.last for name, curve in look.curves.items()}
    parts = [f"{last['samples_per_s']:,.0f} samples/s"] if math.isfinite(last.get("samples_per_s", math.nan)) else []
    parts += [f"{_short(last['step_time_ms'])} ms a step"] if "step_time_ms" in last else []
    parts += [f"lr {_short(last['lr'])}"] if "lr" in last else []
    return [_row("speed", " · ".join(parts))] if parts else []


def _gpus(look: Look, page: Page, now: float) -> "list[Text]":
    return [_gpu(gpu, page, now, look.state.is_final) for gpu in look.gpus]


def _gpu(gpu: Gpu, page: Page, now: float, ended: bool) -> "Text":
    values = gpu.values
    line = _label(gpu.name)
    if (busy := values.get("utilization_percent")) is not None:
        colour = "green" if busy >= 50 else "yellow" if busy >= 10 else "red"
        line.append(bar(busy / 100, 12, page.glyphs), colour).append(f" {busy:>3.0f} %")
    parts = []
    if (used := values.get("memory_used_mib")) is not None:
        parts.append(_memory(used, values.get("memory_mib")))
    parts += [f"{values['power_w']:.0f} W"] if "power_w" in values else []
    parts += [f"{values['temperature_c']:.0f} °C"] if "temperature_c" in values else []
    parts += [f"not sampled for {duration(now - gpu.t)}"] if not ended and now - gpu.t > STALE_S else []
    parts += [gpu.model] if gpu.model else []
    return line.append_text(_text("  " + "  ".join(parts)))


def _host(look: Look, page: Page) -> "list[Text]":
    cores, used = look.host.get("cpu/cores"), look.host.get("memory/used_mib")
    asked, parts = look.request, []
    if cores is not None:
        share = f"{bar(cores / asked.cores, 12, page.glyphs)} " if asked.cores else ""
        parts.append(f"{share}{cores:.1f}" + (f" of {asked.cores}" if asked.cores else "") + " cores")
    if used is not None:
        parts.append("memory " + _memory(used, asked.memory_mib))
    return [_row("cpu", "  ".join(parts))] if parts else []


def _memory(used_mib: float, total_mib: float | None) -> str:
    if total_mib:
        return f"{used_mib / 1024:.1f}/{total_mib / 1024:.0f} GiB"
    return f"{used_mib / 1024:.1f} GiB"


def _all_warnings(look: Look) -> list[str]:
    own = list(look.warnings)
    return own + [f"{_name(one)}: {text}" for one in look.below for text in one.warnings]


def _below(look: Look, page: Page) -> "list[Text]":
    """A line for each run below: its state, how far it is, and what it reached."""
    rows = []
    width = max((len(_name(one)) for one in look.below), default=0)
    for one in look.below:
        line = _text(f"  {_name(one):<{width}} ")
        line.append(f"{one.state.name:<10}", COLOURS.get(one.state.name, "red"))
        last = {name: curve.last for name, curve in one.curves.items()}
        parts = [one.state.progress if not one.state.is_final else "", *_reached(last)]
        started, ended = one.state.started, one.state.ended
        parts += [duration(ended - started)] if started and ended else []
        parts += [one.state.reason if one.state.is_final else ""]
        rows.append(line.append_text(_text(" " + " · ".join(part for part in parts if part))))
    return rows


def _reached(last: Mapping[str, float]) -> Iterable[str]:
    for name in ("val_accuracy", "accuracy", "val_loss", "loss"):
        if name in last:
            yield f"{name} {_short(last[name])}"
            break
    if math.isfinite(last.get("samples_per_s", math.nan)):
        yield f"{last['samples_per_s']:,.0f} samples/s"


def _name(look: Look) -> str:
    return look.state.run_id.rpartition("/")[2]


def _log_title(look: Look, active: Look) -> str:
    ranks = {rank for rank, _ in active.lines}
    whose = f" of rank {ranks.pop()}" if ranks and ranks != {0} else ""
    return f"log{whose}" + (f" of {_name(active)}" if active is not look else "")


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def as_json(look: Look) -> dict[str, Any]:
    """Return a look as plain JSON data: what is not finite is text, as JSON has no word for it."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    curves = {
        name: {"last": number(curve.last), "points": [[step, number(value)] for step, value in curve.points]}
        for name, curve in look.curves.items()
    }
    gpus = [
        {"name": gpu.name, "model": gpu.model, "t": gpu.t, **{k: number(v) for k, v in gpu.values.items()}}
        for gpu in look.gpus
    ]
    return {
        "state": vars(look.state),
        "request": vars(look.request),
        "progress": {unit: {k: r.get(k) for k in ("done", "total", "text")} for unit, r in look.progress.items()},
        "metrics": curves,
        "gpus": gpus,
        "host": {name: number(value) for name, value in look.host.items()},
        "warnings": list(look.warnings),
        "log": [{"rank": rank, "line": line} for rank, line in look.lines[-LOG_LINES:]],
        "below": [as_json(one) for one in look.below],
    }
