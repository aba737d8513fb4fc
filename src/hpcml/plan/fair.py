"""Whether plans can be compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import Problem
from .schema import Plan

FAIR_PARAMS = ("global_batch", "seed", "epochs", "data", "weights", "image_size")


def unfair(plans: Mapping[str, Plan]) -> list[Problem]:
    """Return what keeps plans from being compared: each value that must be the same and isn't, with who has which."""
    values: dict[str, dict[str, Any]] = {
        **{key: {name: plan.effective_params.get(key) for name, plan in plans.items()} for key in FAIR_PARAMS},
        "keras": {name: plan.keras for name, plan in plans.items()},
        "precision": {name: plan.precision for name, plan in plans.items()},
        "env": {name: dataclasses.asdict(plan.env) for name, plan in plans.items()},
        "slurm": {name: dataclasses.asdict(plan.slurm) for name, plan in plans.items()},
        "cores per run": {name: plan.cores for name, plan in plans.items()},
    }
    return [
        Problem(
            f"{key} differs: " + ", ".join(f"{name} has {value}" for name, value in by_name.items()),
            "compare",
            "the same for all",
            "set it once, in the base job that the variants share",
        )
        for key, by_name in values.items()
        if len(set(map(repr, by_name.values()))) > 1
    ]
