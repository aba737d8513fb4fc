"""The settings that a run ran with: threads, data, parameters, provenance, each with where it came from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from .measured import Measured
from .records import Records


@dataclass(frozen=True)
class Setting:
    """One value with where it came from; ``origin`` may be empty."""

    name: str
    value: str
    origin: str = ""


# Two names of one thing: the second is told only where it differs from the first.
_SAME = {"node": "host", "python version": "python"}
# Told among the resources.
_TOLD_THERE = ("strategy", "nodes")


def settings_of(plan: Plan | None, found: Records, origin: Mapping[str, Any]) -> dict[str, tuple[Setting, ...]]:
    """Sort what is known by what it is about, each thing once; the params of the first rank stand for all.

    Args:
        origin: the run's ``provenance.json``; empty where it has none.
    """
    threads: list[Setting] = []
    data: list[Setting] = []
    provenance: list[Setting] = []
    first = found.params[min(found.params)] if found.params else {}
    for name, value in first.items():
        text = "" if value is None else str(value)
        if not text or (plan and name in _TOLD_THERE):
            continue
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
            setting = Setting(name, "–" if param is None else str(param), _where(plan, f"params.{name}"))
            (data if name in ("data", "data_dir", "dataset") else params).append(setting)
    return {
        "threads": _once(threads),
        "data": _once(data),
        "params": _once(params),
        "provenance": _once(provenance),
    }


def asked_of(plan: Plan | None, measured: Measured) -> tuple[Setting, ...]:
    """Return what a job asked for, and how it trained; the strategy that ``begin()`` was told where the job has none."""
    if plan is None:
        return ()
    keys = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb")
    found = [(key, getattr(plan, key), _where(plan, f"resources.{key}")) for key in keys]
    found.append(("strategy", measured.strategy, _where(plan, "strategy") if plan.strategy else "begin()"))
    if _trains_keras(plan, measured):
        found.append(("keras", plan.keras, _where(plan, "keras")))
    found.append(("precision", plan.precision, _where(plan, "precision")))
    return tuple(Setting(key, str(value), where) for key, value, where in found if value is not None)


def _trains_keras(plan: Plan, measured: Measured) -> bool:
    """Whether Keras trained; with horovod its devices' names are TensorFlow's, which are paths, or torch's."""
    return "tensorflow" in plan.frameworks or bool(
        plan.strategy == "horovod" and measured.devices and measured.devices[0].startswith("/")
    )


def _where(plan: Plan, key: str) -> str:
    """Where a value came from: of a file its name, since the key stands beside it already."""
    origin = plan.origins.get(key, "")
    return origin.removesuffix(key).removesuffix(": ") if origin.endswith(f": {key}") else origin


def _once(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """The settings without those of a name that was there, and those that another name tells already."""
    by_name: dict[str, Setting] = {}
    for setting in settings:
        by_name.setdefault(setting.name, setting)
    return tuple(
        setting
        for setting in by_name.values()
        if (other := by_name.get(_SAME.get(setting.name, ""))) is None or other.value != setting.value
    )


def _provenance(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for table, prefix in (("code", "git"), ("packages", "env"), ("data", "data")):
        values = origin.get(table)
        for name, value in values.items() if isinstance(values, dict) else ():
            if value not in (None, "", [], False):
                yield f"{prefix}.{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for name in ("python_version", "lock_file", "lock"):
        if origin.get(name):
            yield name.replace("_", " "), str(origin[name])
