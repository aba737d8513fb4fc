"""Strategy ``ddp``: the torch helpers against the real torch, two ranks under Gloo as real processes, and whole runs.

What torch was given is fixed when it starts, so it runs in processes of its own; two of them play all the scenes of
``SCENES`` and tell as JSON what came of each.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import facts, job, plan, rundir, site
from hpcml.errors import HpcmlError
from hpcml.node import bootstrap, devices, topology
from hpcml.tracking import journal
from hpcml.training.common import Expected
from hpcml.training.ddp import check_batch
from hpcml.training.torch import advice, choose_device

ROOT = Path(__file__).parent.parent
GPU = Expected("ddp", world=2, gpus_per_task=1)
CPU = Expected("ddp", world=2, virtual=True)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch: not installed (scripts/setup --torch)"
)

# ------------------------------------------------------------------ which device

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        pytest.param([{"CUDA_VISIBLE_DEVICES": "0,1"}] * 2, ["0", "1"], id="both-see-both"),
        pytest.param([{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}], ["0", "1"], id="gpus-per-task"),
        pytest.param([{"CUDA_VISIBLE_DEVICES": "0"}] * 2, ["0", "0"], id="gpus-per-task-in-cgroups"),
        pytest.param([{"CUDA_VISIBLE_DEVICES": "2,3"}] * 2, ["2", "3"], id="not-from-0"),
        pytest.param(
            [{"CUDA_VISIBLE_DEVICES": "MIG-a"}, {"CUDA_VISIBLE_DEVICES": "MIG-b"}], ["MIG-a", "MIG-b"], id="mig"
        ),
    ],
)
def test_each_rank_takes_its_own_gpu_whatever_slurm_shows_it(visible, taken):
    for rank, (shown, own) in enumerate(zip(visible, taken, strict=True)):
        environment = {
            **STEP,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_GPUS_ON_NODE": "2",
            **shown,
        }
        given = devices.choose(topology.detect(environment), environment, machine_gpus=2, gpus_per_node=2)
        assert given.gpus == (own,)
        # CUDA_VISIBLE_DEVICES is that one name now, so it is number 0 to torch.
        assert choose_device(Expected("ddp", world=2, gpus_per_task=len(given.gpus)), seen=len(given.gpus)) == "cuda:0"


@pytest.mark.parametrize("expected", [CPU, Expected("ddp"), Expected("ddp", gpus_per_task=1, virtual=True)])
def test_a_rehearsal_is_on_the_cpu_whatever_torch_sees(expected):
    assert {choose_device(expected, seen) for seen in (0, 1, 2)} == {"cpu"}


@pytest.mark.parametrize(
    ("expected", "seen", "with_cuda", "says"),
    [
        (GPU, 0, True, "torch sees 0 GPUs, this task was given 1(?s:.*)HPCML_DEVICES=cpu"),
        (GPU, 0, False, "built for CPUs only"),
        (GPU, 2, True, "torch sees 2 GPUs, this task was given 1"),
        (Expected("ddp", gpus_per_task=2), 2, True, "one process for each(?s:.*)tasks_per_node = gpus_per_node"),
    ],
)
def test_gpus_that_cannot_be_used_as_given_are_an_error(expected, seen, with_cuda, says, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(HpcmlError, match=f"CUDA_VISIBLE_DEVICES=0: (?s:.*){says}|{says}"):
        choose_device(expected, seen, built_with_cuda=with_cuda)


def test_a_rehearsal_says_what_it_shows_and_what_not():
    assert "run two tasks" in advice(Expected("ddp", virtual=True, virtual_devices=2))[0]
    assert "no speed-up" in advice(CPU)[0]


@pytest.mark.parametrize(
    ("global_batch", "world", "a_rank", "says"),
    [
        (255, 2, None, "can't be shared evenly by 2 ranks(?s:.*)254 or 256"),
        (1, 2, None, "can't be shared evenly by 2 ranks(?s:.*)2 or 2"),
        (256, 2, 256, "2 ranks × 256 samples are 512 a step, but global_batch = 256(?s:.*)128"),
    ],
)
def test_ranks_that_do_not_make_up_the_global_batch(global_batch, world, a_rank, says):
    check_batch(256, 2, 128)
    with pytest.raises(HpcmlError, match=says):
        check_batch(global_batch, world, a_rank)


# ------------------------------------------------------------------ two ranks

SCENES = """
import datetime, json, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpcml import rundir
from hpcml.errors import HpcmlError
from hpcml.tracking.journal import Journal
from hpcml.training import ddp, torch as training
from hpcml.training.common import Expected

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
expected = Expected("ddp", world=2, virtual=True)
cpu = torch.device("cpu")
told = {}
torch.manual_seed(5)
x, y = torch.randn(64, 4), torch.randn(64, 1)
data = TensorDataset(x, y)


def network():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loader(batch=4, sampler=None):
    return DataLoader(data, batch_size=batch, sampler=sampler or DistributedSampler(data, shuffle=False))


def begin(name, model, epochs=1, global_batch=8, expected=expected, stop=None, logged=dict):
    log = Journal(folder / name / f"{rank}.0.rank.jsonl")
    stop = stop or ddp.Stop(folder / "none")
    return training.Training(log, expected, cpu, model=model, epochs=epochs, global_batch=global_batch,
                             began=time.perf_counter(), rank=rank, stop=stop, logged=logged)


def step(call, model, batch, optimizer):
    images, labels = batch
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(call(images), labels).backward()
    optimizer.step()


def train(loop, model, loader, call=None, each=lambda number: None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    number = 0
    for epoch in loop.epochs():
        for batch in loop.steps(loader):
            number += 1
            step(call or model, model, batch, optimizer)
            each(number)
    return number


def tell(name, scene):
    try:
        told[name] = scene()
    except HpcmlError as error:
        told[name] = str(error)


tell("no group", lambda: begin("no-group", network()) and None)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))


def averaged():
    model = DistributedDataParallel(network())
    loop = begin("averaged", model, epochs=2, logged=lambda: {"val_accuracy": 0.5})
    steps = train(loop, model, loader())
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for _ in range(2):  # the same global batches by one process
        for first in range(0, 64, 8):
            step(alone, alone, (x[first : first + 8], y[first : first + 8]), optimizer)
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), alone.parameters()))
    return {"steps": steps, "apart": apart, "same": ddp.same_weights(model), "speeds": len(loop.samples_per_s)}


tell("averaged", averaged)


def unwrapped_by_hand():
    model = network()
    step(model, model, next(iter(loader())), torch.optim.SGD(model.parameters(), 0.1))
    ddp.check_weights(model, step=1)


tell("unwrapped by hand", unwrapped_by_hand)
tell("unwrapped", lambda: begin("unwrapped", network()) and None)


def past_the_wrapper():
    model = DistributedDataParallel(network())
    train(begin("past", model), model, loader(), call=model.module)


tell("past the wrapper", past_the_wrapper)


def by_hand(after, batch=2):
    model = DistributedDataParallel(network())
    reached = []

    def each(number):
        reached.append(number)
        if number == after and rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1e-6

    try:
        loop = begin(f"by-hand-{after}", model, epochs=2, global_batch=2 * batch)
        train(loop, model, loader(batch), each=each)
    except HpcmlError as error:
        return {"says": str(error), "at": reached[-1]}


tell("changed before the 10th", lambda: by_hand(4))
tell("changed in a short epoch", lambda: by_hand(3, batch=4))


def stopped(name, mine, period_s, restart=0):
    # Each rank has a stop file of its own, which appears after another step: as on a file system that is slow to tell.
    path = folder / f"stop-{name}-{rank}"
    model = DistributedDataParallel(network())
    loop = begin(f"stop-{name}", model, epochs=1_000_000 if restart == 0 else 2, stop=ddp.Stop(path, 0, period_s))

    def each(number):
        if number == mine[rank]:
            rundir.write_json(path, {"signal": "SIGUSR2", "time": time.time(), "restart": restart})

    return train(loop, model, loader(), each=each)


tell("stop at every step", lambda: stopped("each", (3, 7), 0))
tell("stop sometimes", lambda: stopped("some", (30, 50), 0.02))
tell("stop seen by one", lambda: stopped("one", (None, 5), 0.02))
tell("stop of another restart", lambda: stopped("old", (3, 3), 0, restart=1))


def lengths():
    model = DistributedDataParallel(network())
    mine = torch.utils.data.SubsetRandomSampler(range(32 if rank else 24))
    train(begin("lengths", model), model, loader(sampler=mine))


tell("lengths", lengths)


def leaves_early():
    model = DistributedDataParallel(network())
    loop = begin("early", model, epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in loop.epochs():
        for number, batch in enumerate(loop.steps(loader())):
            if number == 3:
                break
            step(model, model, batch, optimizer)
    return len(loop.samples_per_s)


tell("leaves early", leaves_early)


def with_loader(make, global_batch=8):
    model = DistributedDataParallel(network())
    train(begin("loaders", model, global_batch=global_batch), model, make())


tell("no batch", lambda: with_loader(lambda: DataLoader(
    TensorDataset(x[:1], y[:1]), batch_size=4, drop_last=True,
    sampler=DistributedSampler(TensorDataset(x[:1], y[:1]), drop_last=True))))
tell("batch of the whole", lambda: with_loader(lambda: loader(8)))
tell("batches made by the sampler", lambda: with_loader(lambda: DataLoader(data, batch_size=None,
    sampler=torch.utils.data.BatchSampler(DistributedSampler(data), 8, True))))
tell("sampler for 4", lambda: with_loader(lambda: loader(sampler=DistributedSampler(data, num_replicas=4, rank=rank))))
tell("no sampler", lambda: with_loader(lambda: DataLoader(data, batch_size=4)))
tell("no even share", lambda: with_loader(loader, global_batch=9))
tell("another world", lambda: begin("world", network(), expected=Expected("ddp", world=3, virtual=True)) and None)
tell("not on the gpu", lambda: begin("gpu", DistributedDataParallel(network()),
    expected=Expected("ddp", world=2, gpus_per_task=1)) and None)
dist.destroy_process_group()
(folder / f"told.{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What both ranks told, and the folder with their journals."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch: not installed (scripts/setup --torch)")
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "scenes.py").write_text(SCENES)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(topology.free_first_port(1)), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "scenes.py", str(folder), str(rank)],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    return folder, [json.loads((folder / f"told.{rank}.json").read_text()) for rank in (0, 1)]


def both(scenes, name):
    """What the two ranks told of a scene, which must be the same."""
    told = [one[name] for one in scenes[1]]
    assert told[0] == told[1]
    return told[0]


def records(scenes, name, kind, rank=0):
    return [r for r in journal.read(scenes[0] / name) if r["kind"] == kind and r["rank"] == rank]


def test_two_ranks_learn_what_one_process_would_of_the_same_batches(scenes):
    told = both(scenes, "averaged")
    assert (told["steps"], told["same"], told["speeds"]) == (16, [True, True], 2)
    assert told["apart"] < 1e-5


def test_the_journal_of_a_training(scenes):
    for rank in (0, 1):
        (replicas,) = records(scenes, "averaged", "replicas", rank)
        assert (replicas["in_sync"], replicas["expected"], replicas["virtual"]) == (2, 2, True)
        assert replicas["devices"] == ["CPU:0"]
    metrics = records(scenes, "averaged", "metric")
    assert [r["step"] for r in metrics] == [0, 1, 2]
    assert set(metrics[0]["values"]) == {"time_to_first_step_s"}
    for one in metrics[1:]:
        values = one["values"]
        assert set(values) == {"epoch_time_s", "samples_per_s", "step_time_ms"}
        # 8 steps of 8 samples: the whole job's, not one rank's
        assert values["samples_per_s"] == pytest.approx(64 / values["epoch_time_s"])
        assert values["step_time_ms"] == pytest.approx(1000 * values["epoch_time_s"] / 8)
    progress = [(r["done"], r["total"], r["unit"], r["text"]) for r in records(scenes, "averaged", "progress")]
    assert progress == [(n, 2, "epoch", f"epoch {n}/2 val_accuracy 0.500") for n in (1, 2)]
    assert records(scenes, "averaged", "progress", rank=1) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "unwrapped by hand",
            "the weights of rank 1 differ from rank 0's after step 1: the gradients are not averaged",
        ),
        ("past the wrapper", "the weights of rank 1 differ from rank 0's after step 1: the gradients are not averaged"),
        ("unwrapped", "each of the 2 tasks trains the whole job by itself: the model is not wrapped"),
        ("no group", "each of the 2 tasks trains the whole job by itself: no process group"),
        ("another world", "the process group has 2 ranks, the job 3"),
        ("not on the gpu", "the model is on cpu, this task was given a GPU"),
        ("lengths", "the ranks have [6, 8] batches an epoch"),
        ("no batch", "1 samples make no whole batch on 2 ranks"),
        ("batch of the whole", "2 ranks × 8 samples are 16 a step, but global_batch = 8"),
        ("batches made by the sampler", "2 ranks × 8 samples are 16 a step, but global_batch = 8"),
        ("sampler for 4", "the sampler shares the data among 4 ranks, the job has 2"),
        ("no even share", "global_batch = 9 can't be shared evenly by 2 ranks"),
    ],
)
def test_what_is_no_training_by_all_ranks_ends_on_all_of_them(scenes, name, says):
    assert says in both(scenes, name)


def test_ranks_found_apart_are_on_record(scenes):
    (replicas,) = records(scenes, "past", "replicas")
    assert (replicas["in_sync"], replicas["expected"]) == (1, 2)


@pytest.mark.parametrize(("name", "step"), [("changed before the 10th", 10), ("changed in a short epoch", 8)])
def test_ranks_that_drift_apart_later_are_found_soon(scenes, name, step):
    told = both(scenes, name)
    assert f"rank 1 differ from rank 0's after step {step}" in told["says"] and told["at"] == step


def test_all_ranks_stop_after_the_same_step(scenes):
    assert both(scenes, "stop at every step") == 3, "the first to see it is enough, and at once"
    assert both(scenes, "stop sometimes") >= 30
    assert both(scenes, "stop seen by one") >= 5
    (told,) = records(scenes, "stop-each", "message")[-1:]
    assert told["text"] == "stopped after step 3, in epoch 1: SIGUSR2"


def test_a_stop_file_of_another_restart_stops_nobody(scenes):
    assert both(scenes, "stop of another restart") == 16


def test_a_loop_may_leave_an_epoch_early(scenes):
    assert both(scenes, "leaves early") == 3


def test_ranks_that_may_all_see_all_of_the_data_are_told_so(scenes):
    assert both(scenes, "no sampler") is None
    told = [r["text"] for r in records(scenes, "loaders", "message") if "DistributedSampler" in r["text"]]
    assert told and "all ranks see all of it" in told[0]


# ------------------------------------------------------------------ what begin() puts into the environment


def test_the_environment_that_torch_reads_agrees_on_all_ranks():
    ranks = []
    for rank in (0, 1):
        environment = {"HPCML_RANK": str(rank), "HPCML_WORLD_SIZE": "2", "HPCML_PORT": "61234", "HPCML_DEVICES": "cpu"}
        ranks.append(bootstrap.prepare(environment, "ddp", gpus_per_node=2).variables)
    assert [(v["RANK"], v["LOCAL_RANK"], v["WORLD_SIZE"]) for v in ranks] == [("0", "0", "2"), ("1", "1", "2")]
    assert {(v["MASTER_ADDR"], v["MASTER_PORT"]) for v in ranks} == {("127.0.0.1", "61234")}
    assert "TF_USE_LEGACY_KERAS" not in ranks[0] and "TF_CONFIG" not in ranks[0]
    again = bootstrap.outer_environment({**ranks[1], "PATH": "/bin"})
    assert again == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "-1"}, "a run inside this run is not one of its ranks"


def test_torchruns_own_rendezvous_is_left_alone():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "HPCML_DEVICES": "cpu"}
    environment |= {"MASTER_ADDR": "there", "MASTER_PORT": "29500"}
    prepared = bootstrap.prepare(environment, "ddp").variables
    assert not {"MASTER_ADDR", "MASTER_PORT", "RANK"} & set(prepared)


def test_an_address_that_the_user_set_wins():
    environment = {"HPCML_DEVICES": "cpu", "MASTER_PORT": "2345", "GLOO_SOCKET_IFNAME": "eth1"}
    prepared = bootstrap.prepare(environment, "ddp").variables
    assert prepared["MASTER_PORT"] == "2345" and "GLOO_SOCKET_IFNAME" not in prepared


# ------------------------------------------------------------------ the job

RESOURCES = "[resources]\ngpus_per_node = {gpus}\ntasks_per_node = {tasks}\n"


def resolved(folder: Path, text: str) -> plan.Plan:
    (folder / "job.toml").write_text(f'command = ["true"]\nstrategy = "ddp"\n{text}')
    return plan.resolve(job.load(folder / "job.toml"), site.load("generic"))


def test_ddp_takes_a_task_for_each_gpu(tmp_path: Path) -> None:
    assert resolved(tmp_path, RESOURCES.format(gpus=2, tasks=2)).tasks == 2
    assert resolved(tmp_path, RESOURCES.format(gpus=0, tasks=2)).tasks == 2
    with pytest.raises(HpcmlError, match=r"one process for each GPU, but 2 GPUs and 1 tasks(?s:.*)tasks_per_node=2"):
        resolved(tmp_path, RESOURCES.format(gpus=2, tasks=1))


def test_a_policy_of_keras_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HpcmlError, match=r"precision = 'mixed_bfloat16'(?s:.*)torch\.autocast"):
        resolved(tmp_path, 'precision = "mixed_bfloat16"\n' + RESOURCES.format(gpus=2, tasks=2))


def test_the_notebook_has_the_sections_and_values_of_the_others() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext: not installed (pip install 'hpcml[notebook]')")
    ours, theirs = (jupytext.read(ROOT / "notebooks" / f"simple2GPUs{name}.py").cells for name in ("DDP", "Sol2"))
    kinds = [
        [(c.cell_type, c.source.splitlines()[0] if c.source.startswith("## ") else "") for c in cells]
        for cells in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]
    assert [c.source for c in ours if "parameters" in c.metadata.get("tags", [])] == [
        c.source for c in theirs if "parameters" in c.metadata.get("tags", [])
    ]
    written = jupytext.writes(jupytext.read(ROOT / "notebooks/simple2GPUsDDP.py"), fmt="ipynb")
    as_written = [(c["cell_type"], c["source"], c["metadata"]) for c in json.loads(written)["cells"]]
    kept = json.loads((ROOT / "notebooks/simple2GPUsDDP.ipynb").read_text())["cells"]
    assert [(c["cell_type"], c["source"], c["metadata"]) for c in kept] == as_written


def test_the_job_asks_for_what_the_other_jobs_do() -> None:
    ours, theirs = (job.load(ROOT / "jobs" / f"mnist_{name}.toml") for name in ("ddp", "multiworker"))
    assert (ours.resources, ours.params) == (theirs.resources, theirs.params)
    assert ours.params == facts.declared_parameters(ROOT / "notebooks/simple2GPUsDDP.ipynb").defaults
    read = [dataclasses.replace(plan.resolve(one, site.load("generic")), env=None) for one in (ours, theirs)]
    assert plan.unfair({one.name: dataclasses.replace(one, env=job.Environment()) for one in read}) == []


# ------------------------------------------------------------------ whole runs

WORK = """
import hpcml

run = hpcml.begin(strategy="ddp")

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
x, y = torch.randn(64, 4), torch.randn(64, 1)
data = torch.utils.data.TensorDataset(x, y)
sampler = torch.utils.data.DistributedSampler(data)
loader = torch.utils.data.DataLoader(data, batch_size=8 // dist.get_world_size(), sampler=sampler)
model = torch.nn.Linear(4, 1)
{wrap}
optimizer = torch.optim.SGD(model.parameters(), 0.01)
steps = 0
{loop}
print("rank", dist.get_rank(), "steps", steps, "threads", torch.get_num_threads(), run.device, run.samples_per_s != [])
dist.destroy_process_group()
"""
WRAP = "model = torch.nn.parallel.DistributedDataParallel(model)"
LOOP = """
for epoch in run.epochs({epochs}, model, global_batch=8):
    sampler.set_epoch(epoch)
    for xs, ys in run.steps(loader):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(xs), ys)
        loss.backward()
        optimizer.step()
        steps += 1
        {each}
    run.log(step=epoch, loss=loss.item())
"""
JOB = 'script = "work.py"\nstrategy = "ddp"\n[resources]\ngpus_per_node = 2\ntasks_per_node = 2\ncpus_per_task = 1\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def work(wrap: str = WRAP, epochs: int = 2, each: str = "pass", loop: str = LOOP) -> str:
    return WORK.format(wrap=wrap, loop=loop.format(epochs=epochs, each=each))


def start(folder: Path, words: list[str], body: str) -> tuple[subprocess.CompletedProcess[str], rundir.RunDir]:
    (folder / "work.py").write_text(body)
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=240
    )
    runs = [path for path in (folder / "runs").glob("*") if path.is_dir()]
    assert len(runs) == 1, done.stdout + done.stderr
    return done, rundir.RunDir(folder / "runs", runs[0].name)


HERE = ["-m", "hpcml", "run", "job.toml"]


@needs_torch
def test_a_job_of_two_tasks_trains_in_sync(folder: Path) -> None:
    done, run = start(folder, HERE, work())
    assert done.returncode == 0, done.stdout + done.stderr
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 2)
    for rank in (0, 1):
        assert f"rank {rank} steps 16 threads 1 cpu True" in run.log(rank).read_text()
    metrics: dict[int, set[str]] = {}
    for record in journal.read(run.events):
        if record["kind"] == "metric" and record["rank"] == 0:
            metrics.setdefault(record["step"], set()).update(record["values"])
    speed = {"epoch_time_s", "samples_per_s", "step_time_ms", "loss"}
    assert metrics == {0: {"time_to_first_step_s"}, 1: speed, 2: speed}


@needs_torch
def test_a_job_whose_tasks_train_alone_fails_and_says_so(folder: Path) -> None:
    done, run = start(folder, HERE, work(wrap="pass"))
    assert done.returncode == 1
    assert rundir.read_json(run.status)["state"] == "FAILED"
    assert "each of the 2 tasks trains the whole job by itself" in run.log(0).read_text()


@needs_torch
def test_a_run_that_was_never_checked_fails(folder: Path) -> None:
    done, run = start(folder, ["work.py"], work(loop=""))
    assert "was never checked" in done.stderr
    assert "never checked" in rundir.read_json(run.status)["reason"]


@needs_torch
def test_a_stop_file_ends_a_job_on_the_same_step_of_all_ranks(folder: Path) -> None:
    # As a worker writes it when USR2 comes: seen by the ranks at whatever step they have reached.
    each = (
        "if steps == 20 and dist.get_rank() == 1: hpcml.starting.rundir.write_json("
        "run.dir.stop, {{'signal': 'SIGUSR2', 'time': 0, 'restart': 0}})"
    )
    done, run = start(folder, HERE, work(epochs=1_000_000, each=each.replace("{{", "{").replace("}}", "}")))
    said = [run.log(rank).read_text().partition(" steps ")[2].split()[0] for rank in (0, 1)]
    assert said[0] == said[1] and int(said[0]) >= 20, done.stdout + done.stderr
    assert "SIGUSR2" in run.log(0).read_text()


@needs_torch
@pytest.mark.parametrize("world", [1, 2])
def test_without_a_worker_by_hand_and_by_torchrun(folder: Path, world: int) -> None:
    words = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"] if world > 1 else []
    done, run = start(folder, [*words, "work.py"], work())
    assert done.returncode == 0, done.stdout + done.stderr
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", world)


@needs_torch
def test_torch_that_was_imported_before_is_an_error(folder: Path) -> None:
    (folder / "work.py").write_text("import torch, hpcml\nhpcml.begin(strategy='ddp')\n")
    own = {"HPCML_SITE": "local", "HPCML_DEVICES": "cpu"}
    done = subprocess.run(
        [sys.executable, "work.py"], cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "torch was imported before hpcml.begin()" in done.stderr and "restart the kernel" in done.stderr
