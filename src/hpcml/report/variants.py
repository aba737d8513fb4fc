"""The variants below a comparison: their order, and their states while it goes on."""

from collections.abc import Mapping
from typing import Any

from .. import rundir
from ..rundir import RunDir
from .comparison import ONGOING


def ordered(run: RunDir, plan: Mapping[str, Any]) -> list[RunDir]:
    """Return a comparison's variants in the order of its plan."""
    names = list(plan.get("target") or ())
    place = {name: number for number, name in enumerate(names)}
    return sorted(rundir.children(run), key=lambda child: place.get(child.id.rsplit("/", 1)[1], len(names)))


def states_of(children: list[RunDir], state: str, told: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return what is known of each variant by name: what others told, else what its directory shows while it goes on.

    Args:
        state: of the comparison.
        told: by name the state and its reason.
    """
    known = {}
    for child in children:
        name = child.id.rsplit("/", 1)[1]
        if name in told:
            known[name] = told[name]
        elif state in ONGOING and not rundir.read_json(child.status):
            begun = any(child.logs.glob("out.*.txt")) or any(child.events.glob("*.jsonl"))
            known[name] = ("RUNNING" if begun else "PENDING", "")
    return known
