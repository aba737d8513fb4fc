"""The settings that a run ran with: threads, data, parameters, provenance, each with where it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from .records import Records


@dataclass(frozen=True)
class Setting:
    """One value with where it came from; ``origin`` may be empty."""

    name: str
    value: str
    origin: str = ""


def settings_of(plan: Plan | None, found: Records, origin: Mapping[str, Any]) -> dict[str, tuple[Setting, ...]]:
    """Sort what is known by what it is about; the params of the first rank stand for all.

    Args:
        origin: the run's ``provenance.json``; empty where it has none.
    """
    threads: list[Setting] = []
    data: list[Setting] = []
    provenance: list[Setting] = []
    first = found.params[min(found.params)] if found.params else {}
    for name, value in first.items():
        text = "" if value is None else str(value)
        if name.startswith("threads.") or name == "cores_per_task":
            shown, _, where = text.partition(" (")
            threads.append(Setting(name.removeprefix("threads."), shown, where.rstrip(")")))
        elif name.startswith(("data", "stag")):
            data.append(Setting(name.removeprefix("data."), text))
        elif not name.startswith("gpu") or name == "gpus":
            provenance.append(Setting(name, text))
    for name, text in _provenance(origin):
        (data if name.startswith("data.") else provenance).append(Setting(name.removeprefix("data."), text))
    params: list[Setting] = []
    if plan:
        for name, param in plan.effective_params.items():
            setting = Setting(name, "–" if param is None else str(param), plan.origins.get(f"params.{name}", ""))
            (data if name in ("data", "data_dir", "dataset") else params).append(setting)
    return {
        "threads": tuple(threads),
        "data": tuple(data),
        "params": tuple(params),
        "provenance": tuple(provenance),
    }


def _provenance(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for table, prefix in (("code", "git"), ("packages", "env"), ("data", "data")):
        values = origin.get(table)
        for name, value in values.items() if isinstance(values, dict) else ():
            if value not in (None, "", [], False):
                yield f"{prefix}.{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for name in ("python_version", "lock_file", "lock"):
        if origin.get(name):
            yield name.replace("_", " "), str(origin[name])
