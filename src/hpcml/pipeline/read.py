"""A file with ``[[steps]]`` → a ``Pipeline``; every problem of all steps is reported at once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .. import facts, rundir
from .. import job as jobs
from ..errors import HpcmlError, Problem, nearest
from ..job import NAME_PATTERN, WORK_KEYS, Job, Resources
from ..job.tree import assign, dotted, merge, merge_chain, setting
from .order import in_order
from .schema import ACTIONS, CHAMPION, DIRECTIONS, Pipeline, Registration, Step

_OWN = ("name", "needs", "job", "action")
_REGISTER = tuple(f.name for f in fields(Registration))
_JOB = tuple(sorted({f.name for f in fields(Job)} - {"work", "target", "project", "path", "typed", "origins", "name"}))
_DOING = ("job", *WORK_KEYS, "action")
# An action asks a service and writes a few files; TensorFlow's import on a cold file system is the longest part of it.
_ACTION_RESOURCES = Resources(time="00:15:00")


def is_chain(path: Path) -> bool:
    """Whether a file describes a chain; what is no readable job file is none, and is told by whoever reads it as a job."""
    try:
        return "steps" in merge_chain(path)[0]
    except HpcmlError:
        return False


def load(
    path: str | Path, params: Mapping[str, str] | None = None, settings: Mapping[str, str] | None = None
) -> Pipeline:
    """Read a chain of steps.

    The file's own tables are the base of every step, a step's ``job`` file lies over them, the step's own keys over that,
    and what is typed on the command line over all. Shared ``[params]`` reach the steps that declare a parameter of that
    name.

    Args:
        params: ``-p`` values as typed, for every step that knows the parameter, or with ``STEP.`` before the name.
        settings: ``--set table.key`` values as typed, for every step, or ``STEP.table.key`` for one.

    Raises:
        HpcmlError: every problem of the file and the overrides at once.
    """
    path = Path(path)
    tree, origins = merge_chain(path)
    reading = _Reading(path, jobs.project_of(path), tree, origins)
    tables = reading.tables()
    reading.take_overrides(params or {}, settings or {}, list(tables))
    base = reading.base()
    steps = [step for name, table in tables.items() if (step := reading.step(name, table, list(tables))) is not None]
    reading.check_params()
    ordered = in_order(steps, reading.problems, path) if not reading.problems else steps
    if reading.problems or base is None:
        raise HpcmlError(dict.fromkeys(reading.problems))
    return Pipeline(base.name, base.project, path, base, tuple(ordered))


@dataclass
class _Reading:
    """What is known while a file is read."""

    path: Path
    project: Path
    tree: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    params: dict[str, tuple[str, str]] = field(default_factory=dict)  # -p as typed: [STEP.]name → (value, origin)
    settings: dict[str, tuple[str, str]] = field(default_factory=dict)
    known: dict[str, set[str]] = field(default_factory=dict)  # the parameters that each step knows

    def add(self, what: str, origin: str, allowed: str = "", fix: str = "") -> None:
        self.problems.append(Problem(what, origin, allowed, fix))

    @property
    def name(self) -> str:
        """The chain's name, by default its file's."""
        name = self.tree.get("name", self.path.stem)
        return name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else "chain"

    def tables(self) -> dict[str, dict[str, Any]]:
        """The tables of the steps by name, in the file's order."""
        steps, found = self.tree.pop("steps", None), dict[str, dict[str, Any]]()
        if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
            what = "steps is empty" if steps == [] else "steps is no list of tables"
            raise HpcmlError(what, origin=f"{self.path}: steps", allowed="a table [[steps]] for each step")
        for number, step in enumerate(steps, 1):
            name = step.get("name")
            origin = f"{self.path}: steps, number {number}"
            if name is None:
                self.add("a step has no name", origin, fix='name = "train"')
            elif not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
                self.add(f"name = {name!r} is not a step's name", origin, "letters, digits, '.', '_', '-'; at most 64")
            elif name in rundir.NAMES or name in _JOB:
                self.add(f"name = {name!r} means something else in every run", origin, fix=f'name = "{name}-step"')
            elif name in found:
                self.add(f"two steps are named {name!r}", origin, "a name for each step")
            else:
                found[name] = step
        return found

    def take_overrides(self, params: Mapping[str, str], settings: Mapping[str, str], names: Sequence[str]) -> None:
        """Note what was typed on the command line; that a step is not known is a problem."""
        self.params = {key: (text, f"-p {key}") for key, text in params.items()}
        self.settings = {key: (text, f"--set {key}") for key, text in settings.items()}
        for key in params:
            step, dot, _ = key.partition(".")
            if dot and step not in names:
                self.add(f"no step {step!r}", f"-p {key}", ", ".join(names), nearest(step, names))
        for key, (_, origin) in self.settings.items():
            first = key.partition(".")[0]
            if first not in (*names, *_JOB):
                known = [*names, *_JOB]
                self.add(
                    f"{first!r} is neither a step nor a key of a job", origin, ", ".join(names), nearest(first, known)
                )

    def base(self) -> Job | None:
        """What the steps share, as a job without work."""
        for key in WORK_KEYS:
            if key in self.tree:
                origin = self.origins.get(key, str(self.path))
                self.add(f"{key} stands beside [[steps]]", origin, "in a step", f"[[steps]] name = … {key} = …")
                del self.tree[key]
        tree, origins = {**self.tree}, dict(self.origins)
        self._set(tree, origins, "", self.settings)
        return self._job(tree, origins, function=self.name)

    def step(self, name: str, table: dict[str, Any], names: Sequence[str]) -> Step | None:
        """Read one step; None where it can't be."""
        where = f"{self.path}: steps.{name}"
        doing = [key for key in _DOING if key in table]
        if len(doing) != 1:
            what = f"step {name!r} has both {' and '.join(doing)}" if doing else f"step {name!r} does nothing"
            fix = f'action = "{name}"' if not doing and name in ACTIONS else ""
            self.add(what, where, f"exactly one of {', '.join(_DOING)}", fix)
            return None
        action = table.get("action")
        if "action" in table and action not in ACTIONS:
            fix = nearest(action, ACTIONS) if isinstance(action, str) else ""
            self.add(f"action = {action!r} is not known", f"{where}.action", ", ".join(ACTIONS), fix)
            return None
        self._unknown(table, action, where)
        needs = self._needs(name, table, names, action, where)
        keys = {key: value for key, value in table.items() if key not in (*_OWN, *_REGISTER)}
        if action:
            job = self._job({**self.tree, "resources": {}}, dict(self.origins), function=action, name=name)
            job = job and replace(job, resources=_ACTION_RESOURCES, strategy=None, params={}, profile=None)
        else:
            job = self._work(name, table, keys, where)
        registration = self._registration(table, where) if action == "register" else None
        return Step(name, needs, job, action, registration) if job else None

    def _work(self, name: str, table: Mapping[str, Any], keys: dict[str, Any], where: str) -> Job | None:
        """The job of a step: the chain's tables, its job file's, its own."""
        tree, origins = dict(self.tree), dict(self.origins)
        shared = tree.pop("params", {})
        shared = shared if isinstance(shared, dict) else {}
        if "job" in table:
            try:
                below, below_origins = self._job_file(table["job"], where)
            except HpcmlError as error:
                self.problems += error.problems
                return None
            tree, origins = merge(tree, below), {**origins, **below_origins}
        tree, origins = merge(tree, keys), {**origins, **{key: f"{where}.{key}" for key in dotted(keys)}}
        self._set(tree, origins, name, self.settings)
        own = tree.setdefault("params", {})
        typed: dict[str, str] = {}
        if isinstance(own, dict):
            self.known[name] = known = {*own, *self._declared(tree)}
            tree["params"] = own = {**{key: value for key, value in shared.items() if key in known}, **own}
            origins |= {
                f"params.{key}": self.origins[f"params.{key}"]
                for key in shared
                if key in known - {*keys.get("params", {})}
            }
            for key, (text, origin) in self.params.items():
                step, dot, parameter = key.partition(".")
                if (dot and step == name) or (not dot and key in known):
                    parameter = parameter or key
                    if parameter not in own:
                        typed[parameter] = text
                    own[parameter] = jobs.typed_like(own.get(parameter), text)
                    origins[f"params.{parameter}"] = origin
        return self._job(tree, origins, name=name, typed=typed)

    def _job_file(self, named: object, where: str) -> tuple[dict[str, Any], dict[str, str]]:
        if not isinstance(named, str) or not named or "\x00" in named:
            raise HpcmlError(f"job = {named!r} is no path", origin=f"{where}.job", allowed='such as "mnist.toml"')
        tree, origins = merge_chain(self.path.parent / named)
        if "steps" in tree:
            raise HpcmlError(f"{named} is a chain itself", origin=f"{where}.job", fix="name the jobs of its steps")
        tree.pop("name", None)
        return tree, origins

    def _declared(self, tree: Mapping[str, Any]) -> set[str]:
        """The parameters that a step's notebook or percent script declares."""
        target = tree.get("notebook") or tree.get("script")
        path = self.project / target if isinstance(target, str) and "\x00" not in target else None
        if path is None or not os.path.isfile(path):
            return set()  # told when the job is resolved
        found = facts.declared_parameters(path)
        return set(found.defaults) if found else set()

    def _job(
        self, tree: dict[str, Any], origins: dict[str, str], *, function: str | None = None, name: str = "",
        typed: Mapping[str, str] | None = None,
    ) -> Job | None:  # fmt: skip
        tree.setdefault("experiment", self.name)
        if name:
            tree["name"] = f"{self.name}-{name}"[:64]
        try:
            return jobs.from_tree(tree, origins, self.project, self.path, function=function, typed=typed)
        except HpcmlError as error:
            self.problems += error.problems
            return None

    def _set(
        self, tree: dict[str, Any], origins: dict[str, str], step: str, settings: Mapping[str, tuple[str, str]]
    ) -> None:
        """Lay the ``--set`` values over a tree: those for all steps, and those for this one."""
        for key, (text, origin) in settings.items():
            first, _, rest = key.partition(".")
            own = rest if first == step else key if first in _JOB else ""
            if own:
                try:
                    assign(tree, origins, own, setting(own, text), origin)
                except HpcmlError as error:
                    self.problems += error.problems

    def _unknown(self, table: Mapping[str, Any], action: str | None, where: str) -> None:
        """Keys of an action; those of work are checked as a job's."""
        known = (*_OWN, *(_REGISTER if action == "register" else ())) if action else (*_OWN, *_JOB, *WORK_KEYS)
        for key in table:
            if key not in known:
                self.add(f"unknown key {key!r}", where, ", ".join(known), nearest(key, known))

    def _needs(
        self, name: str, table: Mapping[str, Any], names: Sequence[str], action: str | None, where: str
    ) -> tuple[str, ...]:
        before = names[: names.index(name)][-1:]
        needs = table.get("needs", [] if action == "fetch" else before)
        if not isinstance(needs, list | tuple) or not all(isinstance(need, str) for need in needs):
            self.add(f"needs = {needs!r} is no list of steps", f"{where}.needs", 'such as ["prepare"]')
            return ()
        for need in needs:
            if need not in names:
                self.add(f"no step {need!r}", f"{where}.needs", ", ".join(names), nearest(need, names))
        if action == "fetch" and needs:
            self.add("fetch is done before anything is queued, so it can wait for no step", f"{where}.needs", "none")
        return tuple(dict.fromkeys(needs))

    def _registration(self, table: Mapping[str, Any], where: str) -> Registration:
        values: dict[str, str] = {}
        for key in _REGISTER:
            value = table.get(key, "")
            if not isinstance(value, str) or (key in table and not value):
                self.add(f"{key} = {value!r} is not text", f"{where}.{key}", "a string in quotes")
            elif value:
                values[key] = value
        if values.get("better", DIRECTIONS[0]) not in DIRECTIONS:
            fix = nearest(values["better"], DIRECTIONS)
            self.add(f"better = {values['better']!r} is not known", f"{where}.better", ", ".join(DIRECTIONS), fix)
        experiment = self.tree.get("experiment")
        model = str(experiment if isinstance(experiment, str) else self.name).replace("/", "-").replace(":", "-")
        blank = Registration(model, "", "", alias=CHAMPION)
        return replace(blank, **values)

    def check_params(self) -> None:
        """Refuse shared parameters, and typed ones, that no step knows."""
        shared = self.tree.get("params")
        everyone = sorted(set().union(*self.known.values())) if self.known else []
        given = {key: self.origins.get(f"params.{key}", "") for key in (shared if isinstance(shared, dict) else {})}
        given |= {key: origin for key, (_, origin) in self.params.items() if "." not in key}
        for key, origin in given.items():
            if key not in everyone:
                fix = nearest(key, everyone) or "name it in the [params] of the step that it is for"
                self.add(f"no step has a parameter {key!r}", origin, ", ".join(everyone), fix)
