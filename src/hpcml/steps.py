"""The steps of a chain, as one of them sees the others: each is a run with a directory of its own.

``$HPCML_STEPS``, which hpcml sets for the work of every step, is a JSON object: the name of each step that comes before
this one, and the path of its run directory. In Python it is ``run.step("train")``.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import HpcmlError, nearest
from .rundir import RunDir

VARIABLE = "HPCML_STEPS"
# A step that compares models writes this file into its artifacts; "register if better" decides by it.
EVALUATION = "evaluation.json"
# Where the step that fetches leaves the promoted model, in its own run directory.
PROMOTED = "promoted"


def find(name: str, environment: Mapping[str, str] | None = None) -> RunDir:
    """Return the run directory of a step that comes before this one in its chain.

    Raises:
        HpcmlError: no such step before this one, or this run is no step of a chain.
    """
    given = (os.environ if environment is None else environment).get(VARIABLE)
    if not given:
        raise HpcmlError(
            f"no step {name!r}: this run is no step of a chain",
            origin="run.step()",
            fix="start it as one: hpcml run jobs/CHAIN.toml --step NAME",
        )
    try:
        paths = json.loads(given)
        known = {str(step): Path(path) for step, path in paths.items()}
    except (ValueError, AttributeError, TypeError):
        what = f"{VARIABLE} is no JSON object of paths by step"
        raise HpcmlError(what, origin=VARIABLE, fix='such as {"train": "/…/runs/…/train"}') from None
    if name not in known:
        fix = nearest(name, known) or 'a step waits for those in its `needs`: needs = ["…"] in [[steps]]'
        raise HpcmlError(f"no step {name!r} before this one", origin="run.step()", allowed=", ".join(known), fix=fix)
    path = known[name]
    return RunDir(path.parent.parent, f"{path.parent.name}/{path.name}")
