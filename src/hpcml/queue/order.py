"""The runs below a run, in the order that a person thinks of them."""

from .. import rundir
from ..rundir import RunDir


def children(run: RunDir) -> list[RunDir]:
    """Return the runs one level below a run: a comparison's variants and a chain's steps in their order, an array's calls by number."""
    plan = rundir.read_json(run.plan)
    names = plan.get("target", ()) if plan.get("work") in ("comparison", "chain") else ()
    order = {name: number for number, name in enumerate(names)}

    def place(child: RunDir) -> tuple[int, int, str]:
        name = child.id.rpartition("/")[2]
        return order.get(name, len(order)), int(name) if name.isdecimal() else -1, name

    return sorted(rundir.children(run), key=place)
