"""Which rank this process is among how many, where, and how the ranks reach each other.

Read from the variables of whoever started the processes: hpcml's own local launcher, torchrun, Open MPI, or a Slurm
step (srun(1), OUTPUT ENVIRONMENT VARIABLES). Standard library only.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import HpcmlError
from ..slurm import commands, text

# Above Linux's ephemeral ports (32768-60999): nothing gets one of these by chance.
FIRST_PORT, LAST_PORT = 61000, 65535
PORTS_PER_JOB = 64


@dataclass(frozen=True)
class Topology:
    """One process's place.

    Attributes:
        rank, world: this task among all tasks.
        local_rank, local_world: this task among the tasks of its node.
        node, nodes: this node among all nodes.
        hosts: the node names by node index; empty where the starter does not tell.
        tasks_by_node: tasks on each node, by node index.
        source: who said so.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    nodes: int = 1
    hosts: tuple[str, ...] = ()
    tasks_by_node: tuple[int, ...] = (1,)
    source: str = "alone"


def detect(environment: Mapping[str, str]) -> Topology:
    """Return this process's place by its environment.

    Raises:
        HpcmlError: the variables contradict each other.
    """
    for starter, present, read in _STARTERS:
        if all(environment.get(name, "") != "" for name in present):
            try:
                return read(environment)
            except (LookupError, ValueError, ZeroDivisionError) as error:
                raise HpcmlError(f"the variables of {starter} don't fit together: {error}", origin=starter) from None
    return Topology()


def ranks_to_nodes(topology: Topology, distribution: str = "block") -> list[int]:
    """Return the node index of each rank.

    Args:
        distribution: Slurm's ``SLURM_DISTRIBUTION``; ``cyclic`` deals ranks out like cards, all else is by block.
    """
    counts = list(topology.tasks_by_node)
    if distribution.startswith("cyclic"):
        order = [(turn, node) for node, count in enumerate(counts) for turn in range(count)]
        return [node for _, node in sorted(order)]
    return [node for node, count in enumerate(counts) for _ in range(count)]


def addresses(
    topology: Topology,
    environment: Mapping[str, str],
    node_addresses: Callable[[Sequence[str]], Mapping[str, str]] = commands.node_addresses,
    resolve: Callable[[str], object] | None = None,
) -> list[str]:
    """Return ``host:port`` of every rank, the same list on every rank.

    On one node it is the loopback address. On several it is each node's address as the controller knows it, which
    every node reaches, else its name.

    Raises:
        HpcmlError: an address does not resolve, or the starter does not tell the hosts.
    """
    first = first_port(topology, environment)
    if topology.nodes == 1:
        return [f"127.0.0.1:{first + rank}" for rank in range(topology.world)]
    if len(topology.hosts) != topology.nodes:
        raise HpcmlError(
            f"{topology.source} does not tell the other nodes' names, so the ranks can't find each other",
            fix="start the tasks with srun, or one node only",
        )
    layout = ranks_to_nodes(topology, environment.get("SLURM_DISTRIBUTION", "block"))
    if layout[topology.rank] != topology.node:
        raise HpcmlError(
            f"rank {topology.rank} is on node {topology.node}, not on {layout[topology.rank]} as a layout by block gives",
            origin=f"SLURM_DISTRIBUTION={environment.get('SLURM_DISTRIBUTION', '')}",
            fix="start the tasks with --distribution=block",
        )
    if resolve is None:
        import socket  # only several nodes need it; a login node's submit doesn't wait for it

        resolve = socket.gethostbyname
    known = node_addresses(topology.hosts)
    hosts = [known.get(name, name) for name in topology.hosts]
    for host, name in zip(hosts, topology.hosts, strict=True):
        try:
            resolve(host)
        except (OSError, UnicodeError):
            raise HpcmlError(
                f"node {name} has the address {host!r}, which does not resolve here",
                fix="ask the site for names that resolve on compute nodes, or NodeAddr in slurm.conf",
            ) from None
    return [f"{hosts[node]}:{first + rank}" for rank, node in enumerate(layout)]


def first_port(topology: Topology, environment: Mapping[str, str]) -> int:
    """Return rank 0's port; rank r has this plus r.

    ``HPCML_PORT`` wins, else it follows from the cluster's name, the job and step ids and how often the job was begun:
    two clusters may share a host, and after a node failure the first execution may still hold its ports.

    Raises:
        HpcmlError: ``HPCML_PORT`` is no port that leaves room for all ranks.
    """
    wanted = wanted_port(topology.world, environment)
    if wanted is not None:
        return wanted
    job = int(environment.get("SLURM_JOB_ID", "0") or 0)
    job = job + zlib.crc32(environment.get("SLURM_CLUSTER_NAME", "").encode()) if job else _starter_number(environment)
    step = int(environment.get("SLURM_STEP_ID", "0") or 0)
    # Slurm's special steps (batch, interactive, extern) have ids near 2**32.
    step = step if step < 2**31 else 0
    each = max(PORTS_PER_JOB, topology.world)
    blocks = max(1, (LAST_PORT - FIRST_PORT + 1) // each)
    # 29 and 13 share no factor with the number of blocks (70): steps and restarts of one job and neighbouring jobs stay
    # apart.
    restart = int(environment.get("SLURM_RESTART_COUNT", "0") or 0)
    return FIRST_PORT + (job + 29 * step + 13 * restart) % blocks * each


def _starter_number(environment: Mapping[str, str]) -> int:
    """A number that all ranks of one torchrun or mpirun share, and another one's ranks hardly do."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return zlib.crc32("|".join(environment.get(name, "") for name in names).encode())


def wanted_port(world: int, environment: Mapping[str, str]) -> int | None:
    """Return the first port that ``HPCML_PORT`` asks for, None where it doesn't.

    Raises:
        HpcmlError: it is no port that leaves room for all ranks.
    """
    wanted = environment.get("HPCML_PORT")
    if not wanted:
        return None
    highest = LAST_PORT - world + 1
    if not re.fullmatch(r"[0-9]{1,5}", wanted) or not 1024 <= int(wanted) <= highest:
        raise HpcmlError(
            f"{wanted!r} is no port for {world} rank{'s' * (world > 1)}",
            origin="HPCML_PORT", allowed=f"1024 to {highest}", fix="unset it: a free one is found",
        )  # fmt: skip
    return int(wanted)


def tf_config(topology: Topology, hosts: Sequence[str]) -> str:
    """Return TF_CONFIG for this rank (tensorflow.org/guide/distributed_training#TF_CONFIG)."""
    return json.dumps({"cluster": {"worker": list(hosts)}, "task": {"type": "worker", "index": topology.rank}})


def _of_hpcml(env: Mapping[str, str]) -> Topology:
    rank, world = int(env["HPCML_RANK"]), int(env["HPCML_WORLD_SIZE"])
    return Topology(rank, world, rank, world, 0, 1, ("localhost",), (world,), "hpcml run")


def _of_torchrun(env: Mapping[str, str]) -> Topology:
    world, local_world = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    nodes = max(1, world // local_world)
    node = int(env.get("GROUP_RANK", "0"))
    counts = (local_world,) * nodes
    return Topology(int(env["RANK"]), world, int(env["LOCAL_RANK"]), local_world, node, nodes, (), counts, "torchrun")


def _of_open_mpi(env: Mapping[str, str]) -> Topology:
    rank, world = int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
    local_rank, local_world = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    nodes = max(1, world // local_world)
    counts = (local_world,) * nodes
    return Topology(rank, world, local_rank, local_world, rank // local_world, nodes, (), counts, "Open MPI")


def _of_slurm_step(env: Mapping[str, str]) -> Topology:
    hosts = tuple(text.hosts(env.get("SLURM_STEP_NODELIST", "")))
    counts = tuple(text.tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])))
    node = int(env["SLURM_NODEID"])
    rank, world, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    if sum(counts) != world:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE adds up to {sum(counts)}, SLURM_STEP_NUM_TASKS is {world}")
    return Topology(rank, world, local_rank, counts[node], node, len(counts), hosts, counts, "srun step")


_STARTERS: tuple[tuple[str, tuple[str, ...], Callable[[Mapping[str, str]], Topology]], ...] = (
    ("hpcml run", ("HPCML_RANK", "HPCML_WORLD_SIZE"), _of_hpcml),
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK"), _of_torchrun),
    ("Open MPI", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), _of_open_mpi),
    ("srun step", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), _of_slurm_step),
)


def free_first_port(count: int) -> int:
    """Return a port such that it and the next ``count - 1`` are free on the loopback address of this machine."""
    # Whole blocks, as under Slurm: the ranks bind seconds after this look, and a run started beside this one (the next
    # process id) must not be given the same ports meanwhile.
    each = max(PORTS_PER_JOB, count)
    blocks = (LAST_PORT - FIRST_PORT + 1) // each
    for turn in range(blocks):
        first = FIRST_PORT + (os.getpid() + turn) % blocks * each
        if all(_is_free(first + i) for i in range(count)):
            return first
    raise HpcmlError(f"no {count} free ports from {FIRST_PORT} to {LAST_PORT}", fix="set HPCML_PORT")


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return CUDA_VISIBLE_DEVICES as a list (positions, UUIDs or MIG names); None where it is unset."""
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    return tuple(name for name in names if name and not re.fullmatch(r"-\d+|NoDevFiles", name))
