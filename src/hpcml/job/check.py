"""Values picked out of a job file's keys: each problem is collected, none hides another."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import HpcmlError, Problem, nearest
from .duration import seconds
from .schema import (
    GPU_THREAD_MODES,
    LONGEST_PROFILE,
    MOST,
    NAME_PATTERN,
    PARAMETER_PATTERN,
    STAGES,
    STALL_TIMEOUT,
    Data,
    Environment,
    Resources,
    Scalar,
    SlurmOptions,
    Tuning,
)


class Checker:
    """Collects problems while values are picked out of the tree."""

    def __init__(self, origins: Mapping[str, str]) -> None:
        self.origins = origins
        self.problems: list[Problem] = []

    def add(self, what: str, origin: str = "", allowed: str = "", fix: str = "") -> None:
        self.problems.append(Problem(what, origin, allowed, fix))

    def finish(self) -> None:
        if self.problems:
            raise HpcmlError(self.problems)

    def unknown(self, tree: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for key in tree:
            if key not in known:
                where = self.origins.get(prefix + key, "").removesuffix(f": {prefix}{key}")  # the file alone
                allowed = ", ".join(sorted(known - {"base"} if prefix else known))
                self.add(f"unknown key {prefix + key!r}", where, allowed, nearest(key, known) or _begins(key, known))

    def table(self, tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = tree.get(key, {})
        if isinstance(value, dict):
            return value
        self.add(f"{key} = {value!r} is not a table", self.origins.get(key, key), f"a table: [{key}]")
        return {}

    def text(self, tree: Mapping[str, Any], key: str, prefix: str = "") -> str | None:
        value = tree.get(key)
        if value is None or (isinstance(value, str) and value and not re.search(r"[\x00\n\r]", value)):
            return value
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(
            f"{prefix}{key} = {value!r} is not a line of text", origin, "a non-empty string in quotes, on one line"
        )
        return None

    def strings(self, tree: Mapping[str, Any], key: str, prefix: str = "") -> tuple[str, ...]:
        value = tree.get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) and "\x00" not in item for item in value):
            return tuple(value)
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(f"{prefix}{key} = {value!r} is not a list of strings", origin, 'a list of strings, such as ["a", "b"]')
        return ()

    def count(self, tree: Mapping[str, Any], key: str, prefix: str, low: int) -> int | None:
        value = tree.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST):
            return value
        unit = {"mem_gb": " (GiB a node)", "cpus_per_task": " (cores)"}.get(key, "")
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(
            f"{prefix}{key} = {value!r} is not a whole number" + (" in range" if type(value) is int else ""),
            origin,
            f"a whole number from {low} to {MOST:,}{unit}, without quotes",
        )
        return None

    def choice(self, tree: Mapping[str, Any], key: str, allowed: Sequence[str], prefix: str = "") -> str | None:
        value = tree.get(key)
        if value is None or value in allowed:
            return value
        fix = nearest(value, allowed) if isinstance(value, str) else ""
        key = prefix + key
        self.add(f"{key} = {value!r} is not known", self.origins.get(key, key), ", ".join(allowed), fix)
        return None

    def name(self, tree: Mapping[str, Any], path: Path | None) -> str:
        value = tree.get("name", path.stem if path else "job")
        if isinstance(value, str) and NAME_PATTERN.fullmatch(value):
            return value
        origin = self.origins.get("name", f"the file's name, {path}" if path else "name")
        self.add(
            f"name = {value!r} is not a job name",
            origin,
            "letters, digits, '.', '_', '-'; a letter or digit first; at most 64",
        )
        return "job"

    def params(self, table: Mapping[str, Any]) -> dict[str, Scalar]:
        for key, value in table.items():
            origin = self.origins.get(f"params.{key}", f"params.{key}")
            if not PARAMETER_PATTERN.fullmatch(key):
                self.add(f"parameter {key!r} is not a name", origin, "letters, digits and '_', as a Python variable")
            if not isinstance(value, str | int | float | bool):
                self.add(f"params.{key} = {value!r} is not a single value", origin, "a string, number or boolean")
            elif isinstance(value, str) and "\x00" in value:
                self.add(f"params.{key} holds a NUL character", origin, "text that a process can be given")
        return dict(table)


def _begins(key: str, known: set[str]) -> str:
    """As ``nearest``, for the beginning of a name: ``gpus`` is not near enough to ``gpus_per_node``."""
    start = key.rstrip("s")
    match = min((name for name in known if len(start) > 2 and name.startswith(start)), default="")
    return f"did you mean {match!r}?" if match else ""


def resources(check: Checker, table: Mapping[str, Any]) -> Resources:
    """Take up the ``[resources]`` table."""
    check.unknown(table, {f.name for f in fields(Resources)}, "resources.")
    default = Resources()
    time = table.get("time", default.time)
    try:
        if seconds(time if isinstance(time, str) else "") == 0:
            raise ValueError
    except ValueError:
        origin = check.origins.get("resources.time", "resources.time")
        check.add(
            f"resources.time = {time!r} is not a time limit",
            origin,
            '"30" (minutes), "00:30:00" or "1-00:00:00", in quotes',
        )
        time = default.time
    return Resources(
        nodes=check.count(table, "nodes", "resources.", 1) or default.nodes,
        gpus_per_node=check.count(table, "gpus_per_node", "resources.", 0) or 0,
        tasks_per_node=check.count(table, "tasks_per_node", "resources.", 1) or default.tasks_per_node,
        cpus_per_task=check.count(table, "cpus_per_task", "resources.", 1),
        mem_gb=check.count(table, "mem_gb", "resources.", 1),
        time=time,
    )


def slurm(check: Checker, table: Mapping[str, Any]) -> SlurmOptions:
    """Take up the ``[slurm]`` table."""
    check.unknown(table, {f.name for f in fields(SlurmOptions)}, "slurm.")
    texts = {
        f.name: check.text(table, f.name, "slurm.")
        for f in fields(SlurmOptions)
        if f.name not in ("extra", "max_requeues")
    }
    extra = check.strings(table, "extra", "slurm.")
    for option in extra:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[^\n\r]*)?", option):
            origin = check.origins.get("slurm.extra", "slurm.extra")
            check.add(
                f"slurm.extra: {option!r} is not an option of sbatch", origin, 'long options, such as "--mail-type=END"'
            )
    return SlurmOptions(**texts, extra=extra, max_requeues=check.count(table, "max_requeues", "slurm.", 0) or 0)


def environment(check: Checker, table: Mapping[str, Any]) -> Environment:
    """Take up the ``[env]`` table."""
    check.unknown(table, {f.name for f in fields(Environment)}, "env.")
    if "name" in table and "python" in table:
        check.add("env.name and env.python are both set", check.origins.get("env.python", ""), "one of them")
    variables = table.get("vars", {})
    if not isinstance(variables, dict):
        check.add(f"env.vars = {variables!r} is not a table", check.origins.get("env.vars", ""), "a table: [env.vars]")
        variables = {}
    for key, value in variables.items():
        origin = check.origins.get(f"env.vars.{key}", f"env.vars.{key}")
        if not PARAMETER_PATTERN.fullmatch(key):
            check.add(f"env.vars: {key!r} is not a variable's name", origin, "letters, digits and '_'")
        if not isinstance(value, str) or "\x00" in value:
            check.add(f"env.vars.{key} = {value!r} is not a string", origin, "a string in quotes")
    return Environment(
        name=check.text(table, "name", "env."),
        python=check.text(table, "python", "env."),
        modules=check.strings(table, "modules", "env."),
        vars=dict(variables),
    )


def data(check: Checker, table: Mapping[str, Any]) -> Data:
    """Take up the ``[data]`` table."""
    check.unknown(table, {f.name for f in fields(Data)}, "data.")
    source, version = check.text(table, "source", "data."), check.text(table, "version", "data.")
    if source is None and "source" not in table and table:
        origin = check.origins.get(f"data.{next(iter(table))}", "data")
        check.add(
            "[data] doesn't say which data set", origin, "source: a name below the data folder, or a path with a /"
        )
    return Data(source, version, check.choice(table, "stage", STAGES, "data.") or Data.stage)


def tuning(check: Checker, table: Mapping[str, Any]) -> Tuning:
    """Take up the ``[tuning]`` table."""
    check.unknown(table, {f.name for f in fields(Tuning)}, "tuning.")
    origin = {key: check.origins.get(f"tuning.{key}", f"tuning.{key}") for key in table}
    jit, mode = table.get("jit_compile"), table.get("gpu_thread_mode")
    if jit is not None and not isinstance(jit, bool):
        check.add(f"tuning.jit_compile = {jit!r} is neither true nor false", origin["jit_compile"], "true or false")
        jit = None
    if mode is not None and mode not in GPU_THREAD_MODES:
        fix = nearest(mode, GPU_THREAD_MODES) if isinstance(mode, str) else ""
        what = f"tuning.gpu_thread_mode = {mode!r} is not known"
        check.add(what, origin["gpu_thread_mode"], ", ".join(GPU_THREAD_MODES), fix)
        mode = None
    return Tuning(
        intra_op_threads=check.count(table, "intra_op_threads", "tuning.", 1),
        inter_op_threads=check.count(table, "inter_op_threads", "tuning.", 1),
        omp_threads=check.count(table, "omp_threads", "tuning.", 1),
        data_threads=check.count(table, "data_threads", "tuning.", 0),
        prefetch=check.count(table, "prefetch", "tuning.", -1),
        steps_per_execution=check.count(table, "steps_per_execution", "tuning.", 1),
        jit_compile=jit,
        gpu_thread_mode=mode,
    )


def stall_timeout(check: Checker, tree: Mapping[str, Any]) -> str:
    """Take up ``stall_timeout``: a time as Slurm writes it, or ``off``."""
    value = tree.get("stall_timeout", STALL_TIMEOUT)
    try:
        if value == "off" or seconds(value if isinstance(value, str) else "") > 0:
            return str(value)
    except ValueError:
        pass
    origin = check.origins.get("stall_timeout", "stall_timeout")
    allowed = '"20" (minutes), "00:20:00" or "off", in quotes'
    check.add(f"stall_timeout = {value!r} is not a time", origin, allowed)
    return STALL_TIMEOUT


def profile(check: Checker, tree: Mapping[str, Any]) -> tuple[int, int] | None:
    """Take up the ``[profile]`` table: its first and last step."""
    if "profile" not in tree:
        return None
    table = check.table(tree, "profile")
    check.unknown(table, {"steps"}, "profile.")
    if not isinstance(tree["profile"], dict) or (table and "steps" not in table):
        return None  # told already
    steps = table.get("steps")
    origin = check.origins.get("profile.steps", check.origins.get("profile", "profile"))
    window = steps if isinstance(steps, list) and all(type(step) is int for step in steps) else []
    if len(window) != 2 or not 1 <= window[0] <= MOST or window[1] > MOST:
        what = (
            "profile.steps is missing" if steps is None else f"profile.steps = {steps!r} is not a first and a last step"
        )
        check.add(what, origin, "two whole numbers from 1, such as [10, 20]", "leave [profile] out for no profile")
        return None
    first, last = window
    if last < first:
        what = f"profile.steps = {steps!r} ends before it begins"
        check.add(what, origin, "the first step, then the last", f"[{last}, {first}]" if last > 0 else "")
    elif last - first >= LONGEST_PROFILE:
        what = f"profile.steps = {steps!r} is {last - first + 1:,} steps long; a profile grows with each of them"
        check.add(what, origin, f"at most {LONGEST_PROFILE} steps", f"[{first}, {first + 10}]")
    return first, last
