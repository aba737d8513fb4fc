"""Topology from the variables of each starter, as they were really set, and the ranks' addresses."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence

import pytest

from hpcml.errors import HpcmlError
from hpcml.node import topology
from hpcml.node.topology import FIRST_PORT, LAST_PORT, Topology


def step(
    rank: int, counts: Sequence[int], *, cyclic: bool = False, job: int = 10, step_id: int = 0, nodes: str = ""
) -> dict[str, str]:
    """The environment that srun gives a task; the forms are those of Slurm 22.05."""
    place = [(turn, node) for node, count in enumerate(counts) for turn in range(count)]
    order = sorted(place) if cyclic else [(turn, node) for turn, node in place]
    local, node = order[rank]
    written = ",".join(str(count) for count in counts)
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": str(step_id),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_NUM_NODES": str(len(counts)),
        "SLURM_STEP_TASKS_PER_NODE": written,
        "SLURM_STEP_NODELIST": nodes or (f"gpu[01-{len(counts):02d}]" if len(counts) > 1 else "gpu01"),
        **({"SLURM_DISTRIBUTION": "cyclic"} if cyclic else {}),
    }


# The allocation around a step: what a batch script and salloc's shell see, too.
ALLOCATION = {"SLURM_JOB_ID": "15", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NODELIST": "gpu[01-02]"}
ALLOCATION |= {"SLURM_TASKS_PER_NODE": "2(x2)"}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
INTERACTIVE = BATCH | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu01",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1"}.items()}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HERE = {"HPCML_RANK": "1", "HPCML_WORLD_SIZE": "2"}
UNEVEN = ("gpu01", "gpu02", "gpu03")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, Topology(), id="alone"),
        pytest.param(ALLOCATION, Topology(), id="salloc"),
        pytest.param(BATCH, Topology(), id="batch script"),
        pytest.param(INTERACTIVE, Topology(hosts=("gpu01",), source="srun step"), id="interactive step"),
        pytest.param(step(0, [1]), Topology(hosts=("gpu01",), source="srun step"), id="srun -n1"),
        pytest.param(step(1, [2]), Topology(1, 2, 1, 2, 0, 1, ("gpu01",), (2,), "srun step"), id="one node"),
        pytest.param(
            step(5, [2, 2, 2, 1]) | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[01-02,5,7]"},
            Topology(5, 7, 1, 2, 2, 4, ("gpu01", "gpu02", "gpu5", "gpu7"), (2, 2, 2, 1), "srun step"),
            id="uneven",
        ),
        pytest.param(
            step(3, [3, 1, 1]) | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)"},
            Topology(3, 5, 0, 1, 1, 3, UNEVEN, (3, 1, 1), "srun step"),
            id="uneven, srun -N3 -n5",
        ),
        pytest.param(
            step(3, [3, 1], cyclic=True),
            Topology(3, 4, 2, 3, 0, 2, ("gpu01", "gpu02"), (3, 1), "srun step"),
            id="cyclic",
        ),
        pytest.param(TORCHRUN, Topology(5, 8, 1, 4, 1, 2, (), (4, 4), "torchrun"), id="torchrun"),
        pytest.param(BATCH | TORCHRUN, Topology(5, 8, 1, 4, 1, 2, (), (4, 4), "torchrun"), id="torchrun in a job"),
        pytest.param(step(0, [1, 1]) | TORCHRUN, Topology(5, 8, 1, 4, 1, 2, (), (4, 4), "torchrun"), id="under srun"),
        pytest.param(OPEN_MPI, Topology(3, 4, 1, 2, 1, 2, (), (2, 2), "Open MPI"), id="mpirun"),
        pytest.param(HERE, Topology(1, 2, 1, 2, 0, 1, ("localhost",), (2,), "hpcml run"), id="hpcml run"),
        pytest.param(
            INTERACTIVE | HERE, Topology(1, 2, 1, 2, 0, 1, ("localhost",), (2,), "hpcml run"), id="hpcml run in a job"
        ),
    ],
)
def test_this_processs_place(environment: dict[str, str], expected: Topology) -> None:
    assert topology.detect(environment) == expected


@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        (step(0, [2]) | {"SLURM_STEP_TASKS_PER_NODE": "3"}, "srun step"),
        (step(0, [2]) | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "srun step"),
        (step(0, [2]) | {"SLURM_NODEID": "4"}, "srun step"),
        ({k: v for k, v in step(0, [2]).items() if k != "SLURM_LOCALID"}, "srun step"),
        (TORCHRUN | {"RANK": "x"}, "torchrun"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "torchrun"),
        ({k: v for k, v in OPEN_MPI.items() if not k.endswith("LOCAL_SIZE")}, "Open MPI"),
    ],
)
def test_variables_that_contradict_each_other_name_their_starter(environment: dict[str, str], starter: str) -> None:
    with pytest.raises(HpcmlError, match=f"{starter}.*don't fit together"):
        topology.detect(environment)


# ------------------------------------------------------------------ addresses


def known(names: Sequence[str]) -> Mapping[str, str]:
    return {name: f"10.0.0.{int(name[-2:])}" for name in names}


def resolves(host: str) -> str:
    return host


def cluster_of(environment: dict[str, str]) -> dict[str, list[str]]:
    place = topology.detect(environment)
    config = json.loads(topology.tf_config(place, topology.addresses(place, environment, known, resolves)))
    assert config["task"] == {"type": "worker", "index": place.rank}
    cluster: dict[str, list[str]] = config["cluster"]
    return cluster


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("counts", [[8] * 8, [2, 2, 2, 1], [3, 1, 1], [1, 3], [1, 1]])
def test_all_ranks_tell_the_same_addresses(counts: list[int], cyclic: bool) -> None:
    world = sum(counts)
    told = [cluster_of(step(rank, counts, cyclic=cyclic)) for rank in range(world)]
    assert all(cluster == told[0] for cluster in told)
    workers = told[0]["worker"]
    assert len(workers) == len(set(workers)) == world
    assert all(FIRST_PORT <= int(worker.rsplit(":")[1]) <= LAST_PORT for worker in workers)
    for rank in range(world):
        node = int(step(rank, counts, cyclic=cyclic)["SLURM_NODEID"])
        assert workers[rank].startswith(f"10.0.0.{node + 1}:")


def test_addresses_stay_apart_where_all_nodes_are_one_machine() -> None:
    environment = step(0, [2, 2])
    place = topology.detect(environment)
    hosts = topology.addresses(place, environment, lambda names: dict.fromkeys(names, "127.0.0.1"), resolves)
    assert len(set(hosts)) == 4


def test_one_node_talks_to_itself() -> None:
    def ask(_: object) -> Mapping[str, str]:
        raise AssertionError("nobody need be asked")

    environment = step(1, [2])
    hosts = topology.addresses(topology.detect(environment), environment, ask, ask)
    assert [host.rsplit(":")[0] for host in hosts] == ["127.0.0.1"] * 2


def test_a_node_that_scontrol_does_not_know_goes_by_its_name() -> None:
    environment = step(0, [1, 1], nodes="login1,login2")
    hosts = topology.addresses(topology.detect(environment), environment, lambda names: {}, resolves)
    assert [host.rsplit(":")[0] for host in hosts] == ["login1", "login2"]


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_an_address_that_does_not_resolve_is_named(error: Exception) -> None:
    def resolve(host: str) -> str:
        if host == "10.0.0.2":
            raise error
        return host

    environment = step(0, [1, 1])
    with pytest.raises(HpcmlError, match=r"node gpu02 has the address '10\.0\.0\.2', which does not resolve"):
        topology.addresses(topology.detect(environment), environment, known, resolve)


def test_a_layout_that_is_not_by_block_is_an_error_not_a_wrong_address() -> None:
    environment = step(1, [2, 2], cyclic=True)
    del environment["SLURM_DISTRIBUTION"]
    with pytest.raises(HpcmlError, match="--distribution=block"):
        topology.addresses(topology.detect(environment), environment, known, resolves)


def test_a_starter_that_tells_no_hosts_serves_one_node_only() -> None:
    with pytest.raises(HpcmlError, match="torchrun does not tell"):
        topology.addresses(topology.detect(TORCHRUN), TORCHRUN, known, resolves)
    one = TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "0"}
    assert len(topology.addresses(topology.detect(one), one, known, resolves)) == 4


# ------------------------------------------------------------------ ports


def ports(environment: dict[str, str]) -> set[int]:
    place = topology.detect(environment)
    return {topology.first_port(place, environment) + rank for rank in range(place.world)}


@pytest.mark.parametrize("first", [1, 69, 70, 123_456, 4_294_967])
@pytest.mark.parametrize("counts", [[1], [2], [64], [8] * 8])
def test_neighbouring_jobs_and_steps_share_no_port(first: int, counts: list[int]) -> None:
    apart = [ports(step(0, counts, job=job)) for job in range(first, first + 20)]
    apart += [ports(step(0, counts, job=first, step_id=number)) for number in (1,)]
    assert len(set().union(*apart)) == sum(map(len, apart))
    assert min(set().union(*apart)) >= FIRST_PORT and max(set().union(*apart)) <= LAST_PORT


def test_equal_jobs_of_two_clusters_on_one_host_share_no_port() -> None:
    one, other = (ports(step(0, [2]) | {"SLURM_CLUSTER_NAME": name}) for name in ("devone", "devother"))
    assert not one & other


def test_a_restart_does_not_meet_the_execution_before_it() -> None:
    apart = [ports(step(0, [2]) | {"SLURM_RESTART_COUNT": str(restart)}) for restart in range(10)]
    assert len(set().union(*apart)) == 20


def test_a_step_of_slurms_own_has_ports_too() -> None:
    assert max(ports(INTERACTIVE)) <= LAST_PORT


def test_a_large_world_fits() -> None:
    assert max(ports(step(0, [1000] * 4, job=69))) <= LAST_PORT


def test_hpcml_port_wins() -> None:
    environment = step(0, [2]) | {"HPCML_PORT": "2000"}
    assert ports(environment) == {2000, 2001}


@pytest.mark.parametrize("port", ["80", "65535", "x", "-1", "70000"])
def test_an_hpcml_port_without_room_is_refused(port: str) -> None:
    environment = step(0, [2]) | {"HPCML_PORT": port}
    with pytest.raises(HpcmlError, match=f"HPCML_PORT: '{port}' is no port for 2 ranks"):
        topology.first_port(topology.detect(environment), environment)


def test_runs_started_side_by_side_look_at_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[set[int]] = []
    for pid in range(5000, 5010):
        monkeypatch.setattr(topology.os, "getpid", lambda pid=pid: pid)
        first = topology.free_first_port(4)
        looked.append(set(range(first, first + 4)))
    assert len(set().union(*looked)) == 40


def test_a_port_in_use_is_passed_over() -> None:
    first = topology.free_first_port(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        taken.listen()
        other = topology.free_first_port(2)
    assert not {first, first + 1} & {other, other + 1}
