"""Which framework a run trained with, in which build, and what that means for a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plan import Plan
from ..rundir import RunDir, read_json
from .measured import Measured

NAMES = {"tensorflow": "TensorFlow", "torch": "torch", "horovod": "Horovod"}


@dataclass(frozen=True)
class Framework:
    """A framework by its usual name; ``version`` as installed, with its build (``2.13.0+cpu``), None where unknown."""

    name: str
    version: str | None = None

    @property
    def text(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}" if self.version else self.name


def of_run(run: RunDir, plan: Plan | None, measured: Measured) -> tuple[Framework, ...]:
    """Return what a run trained with, the framework that computes first; nothing where its strategy doesn't tell.

    Versions are those that the work's own Python found. Horovod trains with torch or with TensorFlow; which, the names
    of its devices tell: TensorFlow's are paths (``/device:GPU:0``), those of a torch run are not (``GPU:0``).
    """
    packages = read_json(run.provenance).get("packages")
    versions: Mapping[str, object] = packages if isinstance(packages, dict) else {}
    needed = list(plan.frameworks[:1]) if plan else []
    if needed == ["horovod"] and measured.devices:
        needed.insert(0, "tensorflow" if measured.devices[0].startswith("/") else "torch")
    return tuple(Framework(NAMES[name], str(versions[name]) if name in versions else None) for name in needed)


def engine(frameworks: Sequence[Framework]) -> str:
    """Return the name of the framework that computes; empty where unknown (Horovod alone only averages)."""
    return next((one.name for one in frameworks if one.name != NAMES["horovod"]), "")


def differ(used: Sequence[Sequence[Framework]]) -> bool:
    """Whether runs trained with different frameworks, or with different builds of one; what is unknown differs from none."""
    names = {tuple(one.name for one in run) for run in used if run}
    builds = {one for run in used for one in run if one.version}
    return len(names) > 1 or len({one.name for one in builds}) < len(builds)


def notes(rows: Sequence[tuple[Measured, Sequence[Framework]]]) -> list[str]:
    """Return what a reader must know where variants that were measured train with different frameworks."""
    by_engine: dict[str, list[str]] = {}
    for measured, frameworks in rows:
        if measured.samples_per_s is not None and (name := engine(frameworks)):
            by_engine.setdefault(name, []).append(measured.name)
    if len(by_engine) < 2:
        return []
    who = "; ".join(f"{name}: {', '.join(names)}" for name, names in by_engine.items())
    return [
        f"Two frameworks ({who}): a speed-up across them is framework and strategy together, and each draws first weights "
        "and order from its own random numbers, so that accuracies agree as those of two seeds do."
    ]
