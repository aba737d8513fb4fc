"""What runs beside a rank's work: telemetry on each node, and delivery to MLflow where the job itself delivers."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping

from ..rundir import RunDir
from ..tracking import follow, telemetry
from . import bootstrap, topology

# A job that has ended should give back its node; what is not sent by then stays for `hpcml sync`.
DELIVERY_S = 30.0
# Where other ranks may wait in a collective for the one that has failed, and the batch script delivers once more; and under
# hpcml run, which does so too.
HURRIED_S = 3.0


@contextlib.contextmanager
def beside(
    run: RunDir, ready: bootstrap.Bootstrap, environment: Mapping[str, str], restart: int
) -> Iterator[threading.Event]:
    """Watch and deliver while the work runs; neither can end it. Set the event where the end must not wait.

    Args:
        environment: as this rank was given it, before its own devices were chosen.
    """
    delivery = follow.in_job(run) if ready.topology.rank == 0 else None
    watching = watch(run, ready, environment, restart)
    hurry = threading.Event()
    try:
        yield hurry
    finally:
        if watching:
            watching.stop()
        again = (
            "HPCML_RANK" in environment and "SUBMITIT_LOCAL_GLOBALID" not in environment
        )  # a function's caller doesn't
        follow.finish(delivery, HURRIED_S if hurry.is_set() or again else DELIVERY_S)


def watch(
    run: RunDir, ready: bootstrap.Bootstrap, environment: Mapping[str, str], restart: int
) -> telemetry.Telemetry | None:
    """Start telemetry in this process; None where another rank of the node watches.

    Args:
        environment: as for ``beside``.
    """
    place = ready.topology
    share = telemetry.share_of(
        topology.visible_gpus(environment), ready.devices.gpus, place.local_rank, place.local_world
    )
    if share is None:
        return None
    devices, first_gpu, host = share
    # Several ranks: the launcher, slurmstepd or torchrun above them. It counts only where Slurm has made no cgroup.
    pid = os.getpid() if place.local_world == 1 else os.getppid()
    file = run.event_file(place.rank, restart, "telemetry")
    return telemetry.start(file, devices, pid, first_gpu=first_gpu, host=host, environment=environment)
