"""The settings that a run ran with: threads, data, parameters, provenance, each with where it came from."""

from dataclasses import dataclass

from ..plan import Plan
from .records import Records


@dataclass(frozen=True)
class Setting:
    """One value with where it came from; ``origin`` may be empty."""

    name: str
    value: str
    origin: str = ""


def settings_of(plan: Plan | None, found: Records) -> dict[str, tuple[Setting, ...]]:
    """Sort the params of rank 0, which stand for all, by what they are about."""
    threads: list[Setting] = []
    data: list[Setting] = []
    provenance: list[Setting] = []
    first = found.params[min(found.params)] if found.params else {}
    for name, value in first.items():
        text = "" if value is None else str(value)
        if name.startswith("threads.") or name == "cores_per_task":
            value_text, _, origin = text.partition(" (")
            threads.append(Setting(name.removeprefix("threads."), value_text, origin.rstrip(")")))
        elif name.startswith(("data", "stag")):
            data.append(Setting(name.removeprefix("data."), text))
        elif not name.startswith("gpu") or name == "gpus":
            provenance.append(Setting(name, text))
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
