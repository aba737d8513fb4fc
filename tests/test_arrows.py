"""The house's arrows run one way: who may import whom, and who may import a framework, read from the syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "hpcml"
# Shared by all rooms, on the standard library alone. journal is the file format of a run's events.
LEAF = {
    *(
        "errors",
        "job",
        "site",
        "facts",
        "filesystem",
        "plan",
        "interpreter",
        "provision",
        "rundir",
        "snapshot",
        "slurm",
    ),
    *("tracking.journal", "tracking.heartbeat", "tracking.provenance", "tracking.installed", "tracking.revision"),
}
FRAMEWORKS = {
    *("tensorflow", "keras", "tf_keras", "torch", "horovod", "numpy", "mlxtend", "matplotlib", "mlflow"),
    *("papermill", "nbclient", "nbformat", "jupyter_client", "jupyter_core", "ipykernel", "IPython", "traitlets"),
    *("submitit", "cloudpickle", "tomlkit", "rich", "pandas", "jinja2", "nbconvert", "bs4", "pygments", "markupsafe"),
    *("xprof", "pynvml", "psutil"),
}
# Whose top may import what the room is about; nobody imports these rooms at their own top (see FRONT below).
OWN_FRAMEWORK = {
    "notebook": {
        "ipykernel",
        "papermill",
        "nbclient",
        "nbformat",
        "jupyter_client",
        "jupyter_core",
        "traitlets",
        "IPython",
    },
    "training": {"numpy"},
}


@dataclass(frozen=True)
class Import:
    """One import statement: of which module, and whether importing the file runs it."""

    file: str
    line: int
    module: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def dotted(path: Path) -> str:
    """A file's module below hpcml, such as ``slurm.text``; the package itself is empty."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(body: list[ast.stmt], at_top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_top
        inner = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_type_checking(node)
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inner if field == "body" else at_top and inner)
        for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from statements(handler.body, inner)


def imports_of(module: str) -> Iterator[Import]:
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
    for node, at_top in statements(ast.parse(path.read_text(encoding="utf-8")).body, True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(["hpcml", *above] if node.level else []) or ""
            base = ".".join(part for part in (base, node.module or "") if part)
            # `from . import x` may name a module or a thing in the package
            below = [f"{base}.{alias.name}" for alias in node.names]
            names = [b if b.removeprefix("hpcml.") in FILES else base for b in below] if base[:5] == "hpcml" else [base]
        for name in dict.fromkeys(names):
            yield Import(str(path.relative_to(PACKAGE)), node.lineno, name, at_top)


IMPORTS = {module: list(imports_of(module)) for module in FILES}


def within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def ours(found: Import) -> str | None:
    """The module of hpcml that is imported, None for others'; the package itself is empty."""
    if found.module == "hpcml":
        return ""
    return found.module.removeprefix("hpcml.") if found.module.startswith("hpcml.") else None


def wrong(sources: set[str], forbidden: set[str] | None = None, allowed: set[str] | None = None) -> list[str]:
    """Imports of hpcml's own, at top or not, that modules of some rooms must not have."""
    return [
        str(found)
        for module, imports in IMPORTS.items()
        if within(module, sources)
        for found in imports
        if (name := ours(found)) is not None
        and name  # the package itself is lazy and holds only names
        and ((forbidden and within(name, forbidden)) or (allowed is not None and not within(name, allowed)))
    ]


def test_the_walk_sees_what_is_there() -> None:
    seen = {(found.file, found.module, found.at_top) for found in IMPORTS["launch.prepare"]}
    assert ("launch/prepare.py", "hpcml.plan", True) in seen
    assert ("launch/prepare.py", "hpcml.slurm.commands", True) in seen
    assert any(found.module == "click" for found in IMPORTS["cli.root"])
    assert {found.module: found.at_top for found in IMPORTS["cli"]} == {
        "sys": True,
        "gc": False,
        "hpcml": False,
        "hpcml.cli.root": False,
    }
    assert LEAF - {"slurm"} <= set(FILES)


ROOMS: list[tuple[str, set[str], set[str] | None, set[str] | None]] = [
    ("the leaf imports nobody but the leaf", LEAF, None, LEAF),
    (
        "a node knows the leaf, data sets to stage, telemetry and delivery to start",
        {"node"},
        None,
        LEAF | {"node", "data", "tracking.telemetry", "tracking.follow"},
    ),
    ("training is handed the topology", {"training"}, None, LEAF | {"training"}),
    ("a report reads run directories only", {"report"}, None, LEAF | {"report"}),
    ("delivery reads run directories only", {"tracking.mlflow"}, None, LEAF | {"tracking"}),
    ("a notebook's engine knows no starter", {"notebook"}, {"run", "starting", "launch", "cli", "queue", "node"}, None),
    ("data knows the leaf", {"data"}, None, LEAF | {"data"}),
    ("a launcher knows no command", {"launch"}, {"cli", "compare", "preflight", "report"}, None),
    ("tuning starts runs and reads their journals", {"tune"}, None, LEAF | {"tune", "launch", "node"}),
    (
        "a chain starts runs, reads their states, registers and reports",
        {"pipeline"},
        None,
        LEAF | {"pipeline", "steps", "launch", "queue", "tracking", "report", "data", "node.devices", "node.topology"},
    ),
    ("a step knows the others by their run directories", {"steps"}, None, LEAF),
    # a Future asks for its run's state, so the queue must not know launchers
    ("the queue asks Slurm and run directories only", {"queue"}, None, LEAF | {"queue"}),
    (
        "nobody imports the command line",
        set(FILES) - {"", "__main__"} - {m for m in FILES if within(m, {"cli"})},
        {"cli"},
        None,
    ),
]


@pytest.mark.parametrize(("sources", "forbidden", "allowed"), [r[1:] for r in ROOMS], ids=[r[0] for r in ROOMS])
def test_arrows_run_one_way(sources: set[str], forbidden: set[str] | None, allowed: set[str] | None) -> None:
    assert wrong(sources, forbidden, allowed) == []


def reached_from(module: str) -> set[str]:
    """All modules of hpcml that importing one runs, its packages' own files included."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in FILES:
            continue
        reached.add(name)
        waiting += ["", *(".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1))]
        waiting += [other for found in IMPORTS[name] if found.at_top and (other := ours(found)) is not None]
    return reached


INSTANT = {"", "cli", "starting", "compare", "launch.prepare", "launch.sbatch", "launch.local", "launch.slurm"}


@pytest.mark.parametrize("front", sorted(INSTANT | {module for module in FILES if within(module, LEAF | {"node"})}))
def test_what_starts_in_an_instant_needs_the_standard_library_only(front: str) -> None:
    foreign = [
        str(found)
        for module in reached_from(front)
        for found in IMPORTS[module]
        if found.at_top and ours(found) is None and found.module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert foreign == []


def test_no_framework_is_imported_at_the_top_but_in_its_own_room() -> None:
    found = [
        str(one)
        for module, imports in IMPORTS.items()
        for one in imports
        if one.at_top
        and (framework := one.module.split(".")[0]) in FRAMEWORKS
        and framework not in OWN_FRAMEWORK.get(module.split(".")[0], set())
    ]
    assert found == []


@pytest.mark.parametrize("module", [m for m in FILES if within(m, {"cli"}) and m != "cli.__main__"])
def test_a_command_imports_no_framework_before_it_runs(module: str) -> None:
    tops = {found.module.split(".")[0] for name in reached_from(module) for found in IMPORTS[name] if found.at_top}
    assert not tops & FRAMEWORKS


def test_every_module_has_a_place() -> None:
    known = {*LEAF, "node", "launch", "run", "starting", "training", "notebook", "data", "tracking", "report", "cli"}
    known |= {"queue", "pipeline", "steps", "compare", "tune", "preflight", "bare", "__main__", ""}
    assert [module for module in FILES if not within(module, known)] == []
