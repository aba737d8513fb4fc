"""A bare run, which nobody planned: what can be known of it, and an id that its ranks share."""

import os
import sys
import time
from pathlib import Path

from .. import facts, rundir
from ..job import NAME_PATTERN, Environment, SlurmOptions
from ..plan import Plan
from ..site import Site
from ..slurm import commands
from .topology import Topology


def plan_of(strategy: str | None, where: Site, script: Path | None, folder: Path) -> Plan:
    """Describe a bare run by what can be known of it, so that every run directory reads alike."""
    name = script.stem if script and NAME_PATTERN.fullmatch(script.stem) else "session"
    declared = facts.declared_parameters(script) if script and script.suffix == ".py" else None
    cores = len(os.sched_getaffinity(0))
    return Plan(
        name=name, site=where.name, scheduler=where.scheduler, work="session",
        target=(os.path.relpath(script, folder),) if script else (), project=str(folder), job_file=None,
        strategy=strategy, keras="legacy", precision="float32", experiment=name,
        nodes=int(os.environ.get("SLURM_STEP_NUM_NODES", "1")), gpus_per_node=0,
        tasks_per_node=1, cpus_per_task=int(os.environ.get("SLURM_CPUS_PER_TASK") or cores),
        mem_gb=None, time_s=0, gres=None, slurm=SlurmOptions(), env=Environment(), params={},
        defaults=declared.defaults if declared else {}, inject=False, notes=(), origins={},
    )  # fmt: skip


def script() -> Path | None:
    """Return the file being run, also by ipython; None in a notebook or at a prompt."""
    main = sys.modules.get("__main__")
    name = getattr(main, "__file__", None) or (sys.argv[0] if sys.argv[0].endswith(".py") else None)
    if name is None or "ipykernel" in sys.modules:
        return None
    if Path(name).name in ("ipython", "ipython3"):
        name = next((word for word in sys.argv[1:] if word.endswith((".py", ".ipy"))), None)
    return Path(name).absolute() if name and Path(name).is_file() else None


def shared_id(root: Path, name: str, place: Topology, restart: int, begun: int) -> str:
    """Return the same id on every rank: the job's id and step with the time of submission, else the starter's own run id.

    Args:
        begun: runs that this process has begun before.
    """
    nth = f"-{begun + 1}" if begun else ""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "0")
    if os.environ.get("HPCML_RUN"):  # under hpcml, after the run that the worker prepared
        return f"{os.environ['HPCML_RUN'].replace('/', '-')}{nth}"
    if job:
        ending = f"-{name}-j{job}.{step}{nth}"
        earlier = sorted(root.glob(f"*{ending}")) if restart else []  # a requeue changes the time of submission
        when = commands.job_fields(int(job)).get("SubmitTime", "").replace("-", "").replace("T", "-").replace(":", "")
        return earlier[-1].name if earlier else f"{when or '00000000-000000'}{ending}"
    parent = os.getppid()  # torchrun's agent or mpirun's daemon: one for all ranks of a node
    when = time.strftime("%Y%m%d-%H%M%S", time.localtime(rundir.started_at(parent)))
    return f"{when}-{name}-{place.source.replace(' ', '')}-{parent}{nth}"
