"""Which GPUs and how many threads a task takes, from environments as Slurm and others set them."""

from __future__ import annotations

import pytest

from hpcml.errors import HpcmlError
from hpcml.node import devices, threads
from hpcml.node.topology import Topology

JOB = {"SLURM_JOB_ID": "9"}


def place(local_rank: int = 0, tasks: int = 1, source: str = "srun step") -> Topology:
    return Topology(local_rank, tasks, local_rank, tasks, 0, 1, ("gpu01",), (tasks,), source)


def gpus(
    environment: list[dict[str, str]], per_node: int | None, *, machine: int = 2, source: str = "srun step"
) -> list[tuple[str, ...]]:
    """Each task's GPUs; one environment a task."""
    return [
        devices.choose(place(rank, len(environment), source), env, machine, per_node).gpus
        for rank, env in enumerate(environment)
    ]


def tasks(count: int, visible: str | None, **more: str) -> list[dict[str, str]]:
    own = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return [JOB | own | more for _ in range(count)]


# ------------------------------------------------------------------ under srun


@pytest.mark.parametrize("per_node", [2, None])
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # --gres=gpu:2, with and without devices constrained by cgroup: both tasks see both.
        pytest.param(
            tasks(2, "0,1", SLURM_STEP_GPUS="0,1", SLURM_GPUS_ON_NODE="2"), [("0",), ("1",)], id="slices of one list"
        ),
        # --gpus-per-task=1: each its own position, and SLURM_STEP_GPUS holds this task's only.
        pytest.param(
            [JOB | {"CUDA_VISIBLE_DEVICES": n, "SLURM_STEP_GPUS": n, "SLURM_GPUS_ON_NODE": "2"} for n in "01"],
            [("0",), ("1",)],
            id="gpus-per-task",
        ),
        # The same under cgroup: position 0 is another device in each task.
        pytest.param(
            tasks(2, "0", SLURM_STEP_GPUS="0", SLURM_GPUS_ON_NODE="2"), [("0",), ("0",)], id="gpus-per-task, cgroup"
        ),
        # --gpu-bind=none sets neither CUDA_VISIBLE_DEVICES nor SLURM_STEP_GPUS.
        pytest.param(tasks(2, None, SLURM_GPUS_ON_NODE="2"), [("0",), ("1",)], id="gpu-bind none"),
        pytest.param(tasks(1, "0,1", SLURM_GPUS_ON_NODE="2"), [("0", "1")], id="one task takes both"),
        pytest.param(tasks(2, "GPU-aa,GPU-bb", SLURM_GPUS_ON_NODE="2"), [("GPU-aa",), ("GPU-bb",)], id="UUIDs"),
        pytest.param(
            tasks(2, "MIG-1/2/0, MIG-1/3/0", SLURM_GPUS_ON_NODE="2"), [("MIG-1/2/0",), ("MIG-1/3/0",)], id="MIG"
        ),
    ],
)
def test_each_task_takes_its_own_under_srun(
    environment: list[dict[str, str]], per_node: int | None, expected: list[tuple[str, ...]]
) -> None:
    assert gpus(environment, per_node) == expected


def test_four_gpus_for_two_tasks() -> None:
    assert gpus(tasks(2, "0,1,2,3"), 4) == [("0", "1"), ("2", "3")]
    assert gpus([JOB | {"CUDA_VISIBLE_DEVICES": n} for n in ("0,1", "2,3")], 4) == [("0", "1"), ("2", "3")]


def test_older_slurms_variables_tell_the_count_too() -> None:
    assert gpus(tasks(2, None, SLURM_JOB_GPUS="0,1"), None) == [("0",), ("1",)]


@pytest.mark.parametrize(("count", "visible"), [(2, "0,1,2"), (4, "0,1"), (2, "0")])
def test_what_cannot_be_shared_evenly_is_an_error(count: int, visible: str) -> None:
    with pytest.raises(HpcmlError, match="can't share them evenly"):
        gpus(tasks(count, visible), None)


# ------------------------------------------------------------------ other starters: one list for all


@pytest.mark.parametrize("source", ["hpcml run", "torchrun", "Open MPI"])
def test_other_starters_tasks_share_the_list_they_all_see(source: str) -> None:
    assert gpus([{}] * 2, None, source=source) == [("0",), ("1",)]
    assert gpus([{}] * 2, 2, source=source) == [("0",), ("1",)]
    assert gpus([{"CUDA_VISIBLE_DEVICES": "3,1"}] * 2, 2, machine=4, source=source) == [("3",), ("1",)]
    assert gpus([{}] * 1, 1, machine=4, source=source) == [("0",)]


@pytest.mark.parametrize("count", [1, 2])
def test_two_tasks_are_never_put_on_the_one_gpu_there_is(count: int) -> None:
    with pytest.raises(HpcmlError, match="2 GPUs a node are wanted, here are 1"):
        gpus([{}] * count, 2, machine=1, source="hpcml run")
    with pytest.raises(HpcmlError, match="2 GPUs a node are wanted, here are 1"):
        gpus(tasks(count, "0", SLURM_GPUS_ON_NODE="1"), 2, source="hpcml run")


def test_torchrun_in_a_task_with_one_of_the_nodes_gpus_has_that_one_only() -> None:
    with pytest.raises(HpcmlError, match="can't share them evenly"):
        gpus(tasks(2, "0", SLURM_GPUS_ON_NODE="2"), None, source="torchrun")


# ------------------------------------------------------------------ HPCML_DEVICES


@pytest.mark.parametrize(
    ("environment", "machine", "per_node", "world", "gpu", "virtual"),
    [
        # auto on a machine of one's own
        ({}, 0, 2, 1, 0, 2),
        ({}, 0, 2, 2, 0, 1),
        ({}, 0, None, 1, 0, 2),
        ({}, 2, 2, 1, 2, 0),
        ({}, 2, None, 1, 2, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, 2, 1, 0, 2),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 2, 2, 1, 0, 2),
        ({}, 2, 0, 3, 0, 0),
        ({}, 0, 0, 1, 0, 0),
        # a rehearsal
        ({"HPCML_DEVICES": "cpu"}, 2, 2, 1, 0, 2),
        (JOB | {"HPCML_DEVICES": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 2, 2, 0, 1),
        (JOB | {"HPCML_DEVICES": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}, 0, None, 1, 0, 2),
        ({"HPCML_DEVICES": "cpu"}, 2, 0, 1, 0, 0),
        # a job without GPUs
        (JOB, 2, 0, 1, 0, 0),
        (JOB, 0, None, 1, 0, 0),
        # GPUs or nothing
        ({"HPCML_DEVICES": "gpu"}, 2, 2, 1, 2, 0),
        ({"HPCML_DEVICES": "gpu"}, 2, 0, 1, 2, 0),
        ({"HPCML_DEVICES": ""}, 0, 2, 1, 0, 2),
    ],
)
def test_the_kind_of_devices(
    environment: dict[str, str], machine: int, per_node: int | None, world: int, gpu: int, virtual: int
) -> None:
    got = devices.choose(place(0, world, "hpcml run"), environment, machine, per_node)
    assert (len(got.gpus), got.virtual) == (gpu, virtual)
    assert got.reason
    assert got.count == (gpu or max(1, virtual))


@pytest.mark.parametrize(
    ("environment", "machine", "per_node"),
    [
        (JOB, 2, 2),
        (JOB | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 2, 2),
        ({"HPCML_DEVICES": "gpu"}, 0, 2),
        ({"HPCML_DEVICES": "gpu"}, 0, None),
        ({"HPCML_DEVICES": "gpu", "CUDA_VISIBLE_DEVICES": "-1"}, 2, None),
    ],
)
def test_wanted_gpus_that_are_not_there_are_an_error(
    environment: dict[str, str], machine: int, per_node: int | None
) -> None:
    with pytest.raises(HpcmlError, match="none is given to this task") as error:
        devices.choose(place(), environment, machine, per_node)
    assert "HPCML_DEVICES=cpu" in str(error.value)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(HpcmlError, match="HPCML_DEVICES: 'tpu'"):
        devices.choose(place(), {"HPCML_DEVICES": "tpu"}, 0, None)


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    ("environment", "affinity", "local_world", "cores"),
    [
        ({}, 8, 1, 8),
        ({}, 8, 2, 4),
        ({}, 1, 4, 1),
        ({"SLURM_CPUS_PER_TASK": "3"}, 8, 2, 3),
        ({"SLURM_CPUS_PER_TASK": "8"}, 8, 2, 8),
        ({"SLURM_CPUS_PER_TASK": "32"}, 2, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "32"}, 2, 1, 2),
        ({"HPCML_CPUS_PER_TASK": "1", "SLURM_CPUS_PER_TASK": "4"}, 4, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "many"}, 4, 2, 2),
        ({"SLURM_CPUS_PER_TASK": "0"}, 4, 2, 2),
    ],
)
def test_a_task_has_as_many_threads_as_cores(
    environment: dict[str, str], affinity: int, local_world: int, cores: int
) -> None:
    got = threads.choose(environment, affinity, local_world, on_gpu=False)
    assert got.cores == cores
    assert got.variables == {
        "OMP_NUM_THREADS": str(cores),
        "OPENBLAS_NUM_THREADS": str(cores),
        "MKL_NUM_THREADS": str(cores),
        "TF_NUM_INTRAOP_THREADS": str(cores),
        "TF_NUM_INTEROP_THREADS": "2",
    }


def test_a_users_own_value_wins_and_is_told() -> None:
    own = {"OMP_NUM_THREADS": "1", "TF_NUM_INTEROP_THREADS": "5", "TF_GPU_THREAD_MODE": "global"}
    got = threads.choose(own, 4, 1, on_gpu=True)
    assert {name: got.variables[name] for name in own} == own
    assert {got.origins[name] for name in own} == {"environment"}
    assert got.variables["TF_NUM_INTRAOP_THREADS"] == "4" and "affinity" in got.origins["TF_NUM_INTRAOP_THREADS"]


def test_gpus_get_launch_threads_of_their_own() -> None:
    assert threads.choose({}, 4, 1, on_gpu=True).variables["TF_GPU_THREAD_MODE"] == "gpu_private"
    assert not any("GPU" in name for name in threads.choose({}, 4, 1, on_gpu=False).variables)
