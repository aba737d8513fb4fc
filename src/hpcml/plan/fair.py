"""Whether plans can be compared."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import Problem
from .schema import Plan

FAIR_PARAMS = ("global_batch", "seed", "epochs", "data", "weights", "image_size")
# What says where a build of a framework is, and what one framework alone reads. Threads are everybody's.
_PLACES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_HOME")
_ONE_FRAMEWORKS = ("TF_", "XLA_", "TORCH_", "PYTORCH_", "HOROVOD_")


def unfair(plans: Mapping[str, Plan]) -> list[Problem]:
    """Return what keeps plans from being compared: each value that must be the same and isn't, with who has which.

    Variants of one framework need one environment. Those of different frameworks may have each its own, as Horovod does
    where it is built apart: which build it was is a fact that a comparison shows. Variables that reach beyond one
    framework, such as numbers of threads or NCCL's, must be the same all the same.
    """
    keys: list[tuple[str, dict[str, Any]]] = [
        *((key, {name: plan.effective_params.get(key) for name, plan in plans.items()}) for key in FAIR_PARAMS),
        ("data set", {name: str(plan.data) for name, plan in plans.items()}),
        ("keras", {name: plan.keras for name, plan in plans.items()}),
        ("precision", {name: plan.precision for name, plan in plans.items()}),
        *_environments(plans),
        ("slurm", {name: dataclasses.asdict(plan.slurm) for name, plan in plans.items()}),
        ("cores per run", {name: plan.cores for name, plan in plans.items()}),
    ]
    return [
        Problem(
            f"{key} differs: " + ", ".join(f"{name} has {value}" for name, value in by_name.items()),
            "compare",
            "the same for all",
            "set it once, in the base job that the variants share",
        )
        for key, by_name in keys
        if _differ(by_name)
    ]


def _differ(by_name: Mapping[str, Any]) -> bool:
    return len(set(map(repr, by_name.values()))) > 1


def _environments(plans: Mapping[str, Plan]) -> list[tuple[str, dict[str, Any]]]:
    """The environments that must be the same: of each framework's variants, and what is shared by all."""
    groups: dict[str, dict[str, Plan]] = {}
    for name, plan in plans.items():
        groups.setdefault(next(iter(plan.frameworks), ""), {})[name] = plan
    if "" in groups:  # of what framework nobody knows: it may be that of any other
        groups = {"": dict(plans)}
    alike = [("env", {name: dataclasses.asdict(plan.env) for name, plan in group.items()}) for group in groups.values()]
    if any(_differ(by_name) for _, by_name in alike):
        return alike
    return [("env.vars", {name: _shared(plan) for name, plan in plans.items()})]


def _shared(plan: Plan) -> dict[str, str]:
    """The variables that reach beyond one framework."""
    own = {name for name in plan.env.vars if name in _PLACES or name.startswith(_ONE_FRAMEWORKS)}
    return {name: plan.env.vars[name] for name in sorted(plan.env.vars) if name not in own or "THREADS" in name}
