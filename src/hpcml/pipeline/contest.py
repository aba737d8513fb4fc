"""Register a model if it is better than the promoted one on the same test set.

Compared are two values of one metric that were measured on the very same test data: the promoted model is evaluated
beside the new one, in the step that evaluates; or its value on data of the same fingerprint is known from its own chain.
Anything else is no comparison, and then nothing is registered.
"""

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..rundir import RunDir
from ..steps import EVALUATION
from ..tracking import mlflow, registry, store
from ..tracking.registry import Version
from .schema import Registration

_FORM = '{"test_data": "<fingerprint>", "accuracy": 0.93, "promoted": {"accuracy": 0.91} or null}'


@dataclass(frozen=True)
class Evaluation:
    """What a step that evaluates has written.

    Attributes:
        test_data: a fingerprint of the test data: equal for equal data.
        value: the new model's.
        promoted: the promoted model's on the same data; None where there was none.
    """

    test_data: str
    value: float
    promoted: float | None = None


@dataclass(frozen=True)
class Decision:
    """What became of a model.

    Attributes:
        registered: whether it is a version now, and promoted.
        version: the version that it is, such as ``MNIST/4``; empty where it is none.
        against: the promoted version that it was compared with; empty where there was none.
        text: the same in words.
    """

    registered: bool
    text: str
    version: str = ""
    against: str = ""
    metric: str = ""
    value: float | None = None
    against_value: float | None = None
    test_data: str = ""


def champion(uri: str, root: Path, model: str, alias: str) -> Version | None:
    """Return the promoted version of a model; None where there is none, which a store that isn't there yet tells at once.

    Raises:
        ServiceSilent: MLflow gives no answer.
    """
    database = store.parse(uri).database
    if database is not None and not database.exists():
        return None
    return next((one for one in registry.versions(uri, root) if one.name == model and alias in one.aliases), None)


def read(run: RunDir, metric: str) -> Evaluation:
    """Return what a step evaluated.

    Raises:
        HpcmlError: there is no such file, or it lacks something.
    """
    path = run.artifacts / EVALUATION
    told = rundir.read_json(path)
    origin, fix = str(path), f"run.dir.artifacts / {EVALUATION!r} holds {_FORM}"
    if not told:
        raise HpcmlError(f"the step {run.id.rpartition('/')[2]} left no {EVALUATION}", origin=origin, fix=fix)
    value, fingerprint = _number(told.get(metric)), told.get("test_data")
    if value is None:
        numbers = ", ".join(key for key in told if _number(told[key]) is not None)
        raise HpcmlError(
            f"{metric} = {told.get(metric)!r} is no finite number", origin=origin, allowed=numbers, fix=fix
        )
    if not isinstance(fingerprint, str) or not fingerprint:
        raise HpcmlError("it does not say on which test data", origin=origin, fix=fix)
    promoted = told.get("promoted")
    theirs = _number(promoted.get(metric)) if isinstance(promoted, dict) else None
    return Evaluation(fingerprint, value, theirs)


def decide(
    chosen: Registration, steps: Mapping[str, RunDir], uri: str, root: Path, evaluated_against: int | None
) -> Decision:
    """Register and promote a model if it is better; called again, it comes to the same version.

    Args:
        steps: the chain's runs by name.
        root: the runs folder.
        evaluated_against: the promoted version that the evaluating step was given.

    Raises:
        HpcmlError: no evaluation, no model, or MLflow takes it not.
        ServiceSilent: MLflow gives no answer.
    """
    trained = steps[chosen.trained_by]
    result = read(steps[chosen.evaluated_by], chosen.metric)
    mlflow.deliver(trained, uri, state="COMPLETED")
    with _alone(root):
        now = champion(uri, root, chosen.model, chosen.alias)
        common: dict[str, Any] = {"metric": chosen.metric, "value": result.value, "test_data": result.test_data}
        if now is not None and now.run == trained.id:
            return Decision(True, f"{now} is {chosen.alias}: {_words(chosen, result.value)}", str(now), **common)
        if now is not None:
            theirs = result.promoted if evaluated_against == now.version else None
            theirs = _known(root, now, chosen.metric, result.test_data) if theirs is None else theirs
            common |= {"against": str(now), "against_value": theirs}
            if theirs is None:
                text = f"not registered: {now} is {chosen.alias}, and it was not evaluated on this test data"
                return Decision(False, text, **common)
            better = result.value > theirs if chosen.better == "higher" else result.value < theirs
            beside = f"{_words(chosen, result.value)}, {now} has {theirs:.4g} on the same test data"
            if not better:
                return Decision(False, f"not registered: {beside}", **common)
        made, _ = registry.register(trained, uri, chosen.model)
        registry.promote(uri, root, made.name, made.version, chosen.alias)
        words = beside if now is not None else f"{_words(chosen, result.value)}; there was none before"
        return Decision(True, f"{made} is {chosen.alias} now: {words}", str(made), **common)


def _known(root: Path, version: Version, metric: str, test_data: str) -> float | None:
    """The value of a promoted version on this test data, from the chain that registered it, where it is still there."""
    parent = RunDir(root, version.run.partition("/")[0])
    if not version.run or not parent.plan.is_file():
        return None
    for step in rundir.read_json(parent.plan).get("steps") or ():
        registration = step.get("registration")
        runs = {one["name"]: RunDir(root, one["run"]) for one in rundir.read_json(parent.plan)["steps"]}
        if registration and runs[registration["trained_by"]].id == version.run:
            with contextlib.suppress(HpcmlError):
                found = read(runs[registration["evaluated_by"]], metric)
                return found.value if found.test_data == test_data else None
    return None


def _words(chosen: Registration, value: float) -> str:
    return f"{chosen.metric} {value:.4g}"


def _number(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]  # it is one


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One decision after the other: between the look at the promoted version and the promotion nobody else promotes."""
    handle = os.open(root / ".promote.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
