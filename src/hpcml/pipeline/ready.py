"""A chain at a site: a plan for each step, which steps are to run, and where those that have run already lie."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import facts, plan, rundir
from .. import site as sites
from ..errors import HpcmlError, Problem, nearest
from ..node import devices, topology
from ..plan import Plan
from ..rundir import RunDir
from ..site import Site
from ..slurm import commands
from ..tracking.mlflow import store_uri
from .read import load
from .schema import Pipeline, Step


@dataclass(frozen=True)
class Ready:
    """A chain that can start.

    Attributes:
        plan: of the whole, for its own run directory: the largest request in each respect, the sum of the time limits.
        plans: by the steps' names.
        chosen: the steps to run, in order.
        earlier: the runs of steps that have run before, by name; the chosen ones build on them.
        in_job: whether what talks to MLflow may do so from a job; else it is done on the person's side.
    """

    pipeline: Pipeline
    site: Site
    why: str
    plan: Plan
    plans: Mapping[str, Plan]
    chosen: tuple[str, ...]
    earlier: Mapping[str, RunDir] = field(default_factory=dict)
    in_job: bool = False

    @property
    def steps(self) -> list[Step]:
        """The chosen steps."""
        return [self.pipeline.step(name) for name in self.chosen]

    def is_here(self, step: Step) -> bool:
        """Whether a step is done on the person's side, by this process or a later one."""
        return step.action == "fetch" or (step.action is not None and not self.in_job)


def prepare(
    path: Path,
    site_name: str | None = None,
    params: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    ask_queue: bool = True,
    here: bool = False,
) -> Ready:
    """Load a chain, choose the site, and decide every step; arguments as of ``launch.prepare.prepare``.

    Raises:
        HpcmlError: everything that is wrong with any step at this site.
    """
    chain = load(path, params, settings)
    if here and not (site_name or os.environ.get("SLURM_JOB_ID") or os.environ.get("HPCML_SITE")):
        where, why = sites.load("local"), "this machine"
    else:
        where, why = sites.choose(site_name, None if site_name else commands.cluster_name())
    queue = facts.gather(chain.job, where, ask_queue=ask_queue)
    plans, problems = dict[str, Plan](), list[Problem]()
    for step in chain:
        known = facts.gather(step.job, where, ask_queue=False)
        try:
            decided = plan.resolve(step.job, where, dataclasses.replace(known, partitions=queue.partitions))
        except HpcmlError as error:
            problems += error.problems
            continue
        topology.wanted_port(decided.tasks, os.environ)
        plans[step.name] = _as_action(decided, step) if step.action else decided
    if problems:
        raise HpcmlError(dict.fromkeys(problems))
    devices.mode_of(os.environ)  # what a worker would refuse is refused here, before anything is made
    whole, names = _whole(chain, list(plans.values())), tuple(step.name for step in chain)
    return Ready(chain, where, why, whole, plans, names, in_job=_in_job(chain, where))


def _in_job(chain: Pipeline, where: Site) -> bool:
    if where.scheduler != "slurm" or not any(step.action for step in chain):
        return False
    with contextlib.suppress(HpcmlError):  # rendered for a site that is elsewhere: its variables are not set here
        return where.delivers_in_job(store_uri(where, chain.project))
    return False


def _as_action(decided: Plan, step: Step) -> Plan:
    return dataclasses.replace(decided, work="action", target=(str(step.action),), stall_s=0)


def _whole(chain: Pipeline, plans: Sequence[Plan]) -> Plan:
    largest = max(plans, key=lambda one: one.nodes * one.gpus_per_node)
    origins = {
        key: origin for key, origin in chain.job.origins.items() if key.partition(".")[0] in ("data", "experiment")
    }
    return dataclasses.replace(
        largest,
        name=chain.name,
        work="chain",
        target=tuple(step.name for step in chain),
        strategy=None,
        experiment=chain.job.experiment or chain.name,
        nodes=max(one.nodes for one in plans),
        cpus_per_task=max(-(-one.cores // one.nodes) for one in plans),
        tasks_per_node=1,
        mem_gb=max((one.mem_gb for one in plans if one.mem_gb), default=None),
        time_s=sum(one.time_s for one in plans if one.work != "action"),
        params={},
        defaults={},
        inject=False,
        notes=tuple(dict.fromkeys(note for one in plans if one.work != "action" for note in one.notes)),
        origins=origins,
        profile=None,
        tuning=type(largest.tuning)(),
        data=chain.job.data,
        stall_s=0,
    )


def choose(ready: Ready, only: Sequence[str], start: str | None, of: str | None, root: Path) -> Ready:
    """Return a chain of which only some steps run; what they need comes from an earlier run of the chain.

    Args:
        only: names of steps; empty for all.
        start: this step and all that come after it.
        of: the earlier run; by default the newest in which all that is needed has completed.
        root: the runs folder.

    Raises:
        HpcmlError: an unknown step, or no run of the chain has what is needed.
    """
    chain = ready.pipeline
    for name, option in [*((name, "--step") for name in only), *([(start, "--from")] if start else [])]:
        if name not in ready.plans:
            raise HpcmlError(
                f"no step {name!r}", origin=option, allowed=", ".join(ready.plans), fix=nearest(name, ready.plans)
            )
    if not only and not start:
        if of:
            raise HpcmlError(
                "a whole chain needs no earlier run", origin="--of", fix="say --from STEP or --step STEP too"
            )
        return ready
    wanted = set(only) | ({start, *chain.after(start)} if start else set())
    before = chain.before(sorted(wanted)) - wanted
    # What lies on this side is looked at anew: another model may have been promoted since.
    wanted |= {name for name in before if chain.step(name).action == "fetch"}
    before -= wanted
    earlier = _earlier(ready, sorted(before), of, root) if before else {}
    return dataclasses.replace(ready, chosen=tuple(s.name for s in chain if s.name in wanted), earlier=earlier)


def _earlier(ready: Ready, names: Sequence[str], of: str | None, root: Path) -> dict[str, RunDir]:
    chain = ready.pipeline
    if of:
        runs = [rundir.find(root, of)]
    else:
        runs = [run for run in rundir.every(root) if "/" not in run.id]
    missing = list(names)
    for run in runs:
        known = rundir.read_json(run.plan)
        if known.get("work") != "chain" or known.get("name") != chain.name:
            continue
        found = runs_of(run, known)
        missing = [name for name in names if name not in found or not _completed(found[name])]
        if not missing:
            _same_data(ready, {name: found[name] for name in names})
            return {name: found[name] for name in names}
    where = f"run {runs[0].id}" if of else f"any run of {chain.name} in {root}"
    what = f"{' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} not completed in {where}"
    first = next(step.name for step in chain if step.name in missing)
    raise HpcmlError(what, origin="--of" if of else "--from", fix=f"--from {first}, or the whole chain")


def runs_of(run: RunDir, known: Mapping[str, object]) -> dict[str, RunDir]:
    """Return the runs of a chain's steps by name: its own, and those of an earlier run that it was built on."""
    told = known.get("steps")
    steps = told if isinstance(told, list) else []
    return {step["name"]: RunDir(run.root, step["run"]) for step in steps}


def _completed(run: RunDir) -> bool:
    return bool(rundir.read_json(run.status).get("state") == "COMPLETED")


def _same_data(ready: Ready, found: Mapping[str, RunDir]) -> None:
    """Refuse to build on steps that worked on another version of the data."""
    problems = []
    for name, run in found.items():
        data = rundir.read_json(run.plan).get("data") or {}
        then, now = (
            (data.get("source"), data.get("version")),
            (ready.plans[name].data.source, ready.plans[name].data.version),
        )
        if then != now:
            was, is_now = (" ".join(filter(None, one)) or "no data set" for one in (then, now))
            what = f"step {name} of {run.id} worked on {was}, and now it is {is_now}"
            problems.append(
                Problem(what, ready.pipeline.job.origins.get("data.version", "[data]"), fix=f"--from {name}")
            )
    if problems:
        raise HpcmlError(problems)
