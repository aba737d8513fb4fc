"""The order of a chain's steps, and what can wait for what."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import Problem
from .schema import Step


def in_order(steps: Sequence[Step], problems: list[Problem], path: Path) -> list[Step]:
    """Return steps so that each comes after those that it needs, else in the file's order; problems are added.

    Needs that lead in a circle, an action that work would have to wait for, and a registration whose steps are not clear
    are problems.
    """
    ordered: list[Step] = []
    left = list(steps)
    while left:
        done = {step.name for step in ordered}
        ready = next((step for step in left if done >= set(step.needs)), None)
        if ready is None:
            circle = _circle(left)
            what = f"the steps wait for one another: {' → '.join(circle)}"
            problems.append(Problem(what, f"{path}: steps.{circle[0]}.needs", fix="take one of the needs away"))
            return list(steps)
        ordered.append(ready)
        left.remove(ready)
    by_name = {step.name: step for step in ordered}
    for step in ordered:
        for need in step.needs:
            action = by_name[need].action
            if step.action is None and action in ("register", "report"):
                what = f"step {step.name!r} waits for {need!r}, which may be done on the login node after the last job"
                allowed = "of the steps after it only register and report"
                problems.append(Problem(what, f"{path}: steps.{step.name}.needs", allowed, "put it before"))
    return [_decided(step, by_name, problems, path) for step in ordered]


def _circle(steps: Sequence[Step]) -> list[str]:
    """Names along a circle of needs, the first again at the end."""
    needs = {step.name: [need for need in step.needs if need in {s.name for s in steps}] for step in steps}
    seen, name = list[str](), steps[0].name
    while name not in seen:
        seen.append(name)
        name = needs[name][0]
    return [*seen[seen.index(name) :], name]


def _decided(step: Step, steps: dict[str, Step], problems: list[Problem], path: Path) -> Step:
    """Fill in which step evaluated and which one trained: the one that registers waits for the first, that for the second."""
    chosen = step.registration
    if chosen is None:
        return step
    before = step.needs
    for key, meaning in (("evaluated_by", "wrote artifacts/evaluation.json"), ("trained_by", "saved the model")):
        name, where = getattr(chosen, key), f"{path}: steps.{step.name}.{key}"
        if not name and len(before) != 1:
            what = f"step {step.name!r} does not say which step {meaning}"
            problems.append(Problem(what, where, ", ".join(before or steps), f'{key} = "…"'))
            return step
        name = name or before[0]
        if name not in steps or steps[name].action:
            works = ", ".join(other.name for other in steps.values() if not other.action)
            problems.append(Problem(f"{key} = {name!r} is no step that works", where, works))
            return step
        chosen = replace(chosen, **{key: name})
        before = steps[name].needs
    return replace(step, registration=chosen)
