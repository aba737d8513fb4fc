"""Everything a rank must have in its environment before a framework is imported, decided in one place.

The worker calls ``prepare`` for the process that it starts; ``hpcml.begin()`` calls it for itself where no worker did.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import HpcmlError
from ..facts import count_gpus
from ..job import Tuning
from ..plan import NOT_KERAS_3, ONE_PROCESS
from . import devices, threads, topology

# How a child learns what its worker prepared.
HANDOVER = "HPCML_NODE"
LEGACY_KERAS = "TF_USE_LEGACY_KERAS"
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
TENSORFLOW = ("original", "mirrored", "multiworker", "horovod")  # the last one with either framework
# How long the ranks of Horovod wait for one another, in its start and in a collective: 30 s by default, which is less than
# imports from a shared file system may differ by. A rank that died is noticed at once by its closed connections.
GLOO_TIMEOUT_S = 300
# Names of the variables that hpcml has set in this environment: a run inside a run must not take them for the user's.
OURS = "HPCML_SET"
PEER = "HPCML_PEER"  # an address on another node
# What a worker or launcher says to its own child only.
_PRIVATE = (HANDOVER, OURS, "HPCML_RANK", "HPCML_WORLD_SIZE", "HPCML_RESTART", "HPCML_PORT", "HPCML_CPUS_PER_TASK")


@dataclass(frozen=True)
class Bootstrap:
    """What was decided for one rank; ``variables`` are to be set in its environment."""

    topology: topology.Topology
    devices: devices.Devices
    threads: threads.Threads
    variables: Mapping[str, str]

    def describe(self) -> str:
        """Return one line for the log."""
        place, given = self.topology, self.devices
        if given.gpus:
            what = f"GPU {','.join(given.gpus)}"
        else:
            what = _count(given.virtual, "virtual CPU device") if given.virtual else "CPU"
        return (
            f"rank {place.rank} of {place.world} ({place.source}) · {what} · "
            f"{_count(self.threads.cores, 'core')} ({self.threads.origin})"
        )

    def facts(self) -> dict[str, object]:
        """Return the parameters of this rank that a run records."""
        return {
            "world_size": self.topology.world,
            "nodes": self.topology.nodes,
            "topology_source": self.topology.source,
            "gpus": ",".join(self.devices.gpus),
            "virtual_cpu_devices": self.devices.virtual,
            "cores_per_task": self.threads.cores,
            **{f"threads.{k}": f"{v} ({self.threads.origins[k]})" for k, v in self.threads.variables.items()},
        }


def prepare(
    environment: Mapping[str, str],
    strategy: str | None,
    keras: str = "legacy",
    gpus_per_node: int | None = None,
    tuning: Tuning | None = None,
) -> Bootstrap:
    """Decide topology, devices, threads, TF_CONFIG and the Keras flavour of this rank.

    Args:
        environment: the process's own; a value that the user set there wins.
        gpus_per_node: what the job asked for; None without a job.
        tuning: the job's threads; None without a job.

    Raises:
        HpcmlError: what was given can't serve the strategy.
    """
    environment = {k: v for k, v in environment.items() if k not in _ours(environment)}
    place = topology.detect(environment)
    if strategy in ONE_PROCESS and place.world > 1:
        raise HpcmlError(
            f"strategy {strategy!r} is one process, but this step has {place.world} tasks; each would train the whole job",
            origin=place.source,
            fix='one task (--ntasks=1), or strategy = "multiworker"',
        )
    given = devices.choose(place, environment, count_gpus(), gpus_per_node)
    chosen = threads.choose(
        environment, len(os.sched_getaffinity(0)), place.local_world, on_gpu=bool(given.gpus), tuning=tuning or Tuning()
    )
    variables = {**chosen.variables, **_keras(strategy, keras, environment)}
    if strategy in TENSORFLOW and not environment.get(LOG_LEVEL):
        # 1 hides INFO; a rehearsal also hides the complaints about a CUDA that is not there. Exceptions are not logs.
        variables[LOG_LEVEL] = "1" if given.gpus else "3"
    if given.gpus or given.virtual or gpus_per_node == 0:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(given.gpus) or "-1"
    if strategy == "multiworker" and place.world > 1 and not environment.get("TF_CONFIG"):
        workers = topology.addresses(place, environment)
        variables["TF_CONFIG"] = topology.tf_config(place, workers)
        # gRPC sends even loopback through a proxy (grpc, doc/environment_variables.md): the workers would wait for ever.
        hosts = dict.fromkeys(worker.rpartition(":")[0] for worker in workers)
        given_by = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
        variables["no_grpc_proxy"] = ",".join(filter(None, [given_by, *hosts]))
    if strategy == "ddp":
        variables |= _torch(place, environment)
    if strategy == "horovod":
        variables |= _horovod(place, environment)
    variables[OURS] = " ".join(sorted(set(variables) - {"CUDA_VISIBLE_DEVICES"}))
    handover = {"topology": dataclasses.asdict(place), "devices": dataclasses.asdict(given)}
    variables[HANDOVER] = json.dumps({**handover, "threads": dataclasses.asdict(chosen)})
    return Bootstrap(place, given, chosen, variables)


def outer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as it was before hpcml prepared it, for another run that is started from inside a run."""
    left_out = _ours(environment)
    if HANDOVER in environment or left_out:
        left_out |= {*_PRIVATE, "TF_CONFIG"}
    return {name: value for name, value in environment.items() if name not in left_out}


def _ours(environment: Mapping[str, str]) -> set[str]:
    return set(environment.get(OURS, "").split())


def received(environment: Mapping[str, str]) -> Bootstrap | None:
    """Return what a worker prepared for this process, None where none did."""
    if not environment.get(HANDOVER):
        return None
    data = json.loads(environment[HANDOVER])
    return Bootstrap(
        topology.Topology(**_tuples(data["topology"])),
        devices.Devices(**_tuples(data["devices"])),
        threads.Threads(**data["threads"]),
        {},
    )


def _torch(place: topology.Topology, environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed's ``env://`` reads (pytorch.org/docs/stable/distributed.html). torchrun has set it itself."""
    if place.source == "torchrun":
        return {}
    if place.world == 1 and not environment.get("HPCML_PORT"):
        # Two notebooks in one allocation would agree on a port by the job's id.
        host, port = "127.0.0.1", str(topology.free_first_port(1))
    else:
        host, _, port = topology.addresses(place, environment)[0].rpartition(":")
    chosen = {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or host,
        "MASTER_PORT": environment.get("MASTER_PORT") or port,
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world),
    }
    if place.nodes == 1 and not environment.get("GLOO_SOCKET_IFNAME"):
        # Gloo asks for the host's own name, which need not resolve; NCCL finds its way by itself.
        chosen["GLOO_SOCKET_IFNAME"] = "lo"
    return chosen


def _horovod(place: topology.Topology, environment: Mapping[str, str]) -> dict[str, str]:
    """What Horovod's Gloo reads (horovod/common/gloo/gloo_context.cc); rank 0 serves the rendezvous, in ``begin``."""
    if place.world == 1 and int(environment.get("HOROVOD_SIZE") or 1) > 1:
        raise HpcmlError(
            f"horovodrun has started {environment['HOROVOD_SIZE']} ranks, whose places hpcml doesn't know",
            origin=f"HOROVOD_SIZE={environment['HOROVOD_SIZE']}",
            fix="start them with hpcml run, sbatch or srun, which need neither ssh nor mpirun",
        )
    # The ranks of one local rank on all nodes; the last node may have fewer tasks than the others.
    across = [node for node, count in enumerate(place.tasks_by_node) if count > place.local_rank]
    chosen = {
        "HOROVOD_HOSTNAME": place.hosts[place.node] if place.hosts else f"node{place.node}",
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(place.world),
        "HOROVOD_LOCAL_RANK": str(place.local_rank),
        "HOROVOD_LOCAL_SIZE": str(place.local_world),
        "HOROVOD_CROSS_RANK": str(across.index(place.node)),
        "HOROVOD_CROSS_SIZE": str(len(across)),
    }
    defaults = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT_S),
    }
    if place.world > 1:
        addresses = topology.addresses(place, environment)
        host, _, port = addresses[0].rpartition(":")
        defaults |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": host, "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
    if place.nodes > 1:
        # A node may know its own name as 127.0.1.1, so which interface leads to the others is told by one of them.
        layout = topology.ranks_to_nodes(place, environment.get("SLURM_DISTRIBUTION", "block"))
        peer = next(rank for rank, node in enumerate(layout) if node != place.node)
        chosen[PEER] = addresses[peer].rpartition(":")[0]
    else:
        defaults["HOROVOD_GLOO_IFACE"] = "lo"  # else Gloo looks up the host's own name, which need not resolve
    return chosen | {name: environment.get(name) or value for name, value in defaults.items()}


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _keras(strategy: str | None, keras: str, environment: Mapping[str, str]) -> dict[str, str]:
    """tf-keras for all TensorFlow strategies of one base, so that they compare; Keras 3 where it is asked for and works."""
    if strategy not in TENSORFLOW:
        return {}
    forced = environment.get(LEGACY_KERAS, "")
    wants_3 = keras == "3" or forced.lower() in ("0", "false")
    if strategy in NOT_KERAS_3 and wants_3:
        raise HpcmlError(
            NOT_KERAS_3[strategy],
            origin=f"{LEGACY_KERAS}={forced}" if forced else 'keras = "3"',
            allowed='keras = "legacy" (tf-keras)',
            fix=f"unset {LEGACY_KERAS}, and set keras only in the base job that the variants share",
        )
    if wants_3:
        return {LEGACY_KERAS: "0"}
    # Horovod may be here for torch; with TensorFlow its import asks for tf-keras.
    if strategy != "horovod" and importlib.util.find_spec("tensorflow") and not importlib.util.find_spec("tf_keras"):
        raise HpcmlError("tf-keras is not installed beside TensorFlow", fix="pip install 'hpcml[tensorflow]'")
    return {LEGACY_KERAS: "1"}
