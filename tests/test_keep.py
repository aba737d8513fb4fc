"""``run.epochs(keep=…)``: a training that is stopped or killed goes on with the same bits, whole models and shared ones.

Ranks under Gloo, as real processes: first what is kept of a model under ``fully_shard``, on as many ranks and on others,
then whole runs that are killed within an epoch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import rundir
from hpcml.node import topology
from hpcml.rundir import RunDir
from hpcml.training.checkpoint import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch: not installed (scripts/setup --torch)"
)

# A training of 3 epochs of 8 steps under fully_shard, in one process for each rank: words are the folder, the rank, the
# restart, the step after which it is asked to stop (0: never), and what else is to happen.
SHARED = """
import hashlib, json, os, random, resource, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpcml import rundir
from hpcml.errors import HpcmlError, Stopped
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal
from hpcml.training import ddp, torch as training, torch_checkpoint
from hpcml.training.checkpoint import Store
from hpcml.training.common import Expected

folder, rank, restart, until, word = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
dist.init_process_group("gloo")
world = dist.get_world_size()
random.seed(rank + 10 * world)
torch.manual_seed(5)
data = TensorDataset(torch.randn(96, 4), torch.randn(96, 1))
sampler = DistributedSampler(data, seed=3)
loader = DataLoader(data, batch_size=12 // world, sampler=sampler)
network = torch.nn.Sequential(
    torch.nn.Linear(4, 7), torch.nn.BatchNorm1d(7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 1))
for layer in (network[0], network[3]):
    fully_shard(layer)
model = fully_shard(network)
torch.manual_seed(rank + 1)
first, last = torch.optim.AdamW(network[0].parameters(), 0.02), torch.optim.SGD([*network[1:].parameters()], 0.02)
scheduler = torch.optim.lr_scheduler.StepLR(first, 2, 0.5)
keep = [first, scheduler, last]
run = RunDir(folder, "r").make()
said = []
torch_checkpoint.check(model, keep)
store = Store(run, restart, torch_checkpoint.looks(model, keep), said.append)
keeper = torch_checkpoint.Keeper(store, ddp.DDP, rank, model, keep, torch.device("cpu"), watched=False)
loop = training.Training(
    Journal(folder / f"{rank}.{restart}.rank.jsonl"), Expected("ddp", world=world, virtual=True), torch.device("cpu"),
    model=model, epochs=3, global_batch=12, began=time.perf_counter(), rank=rank,
    stop=ddp.Stop(run.stop, restart, period_s=0), keeper=keeper)
numbers, steps = [], 0
stopped = ""
try:
    for epoch in loop.epochs():
        sampler.set_epoch(epoch)
        for x, y in loop.steps(loader):
            loss = torch.nn.functional.mse_loss(model(x) + random.random() / 1000, y)
            first.zero_grad()
            last.zero_grad()
            loss.backward()
            first.step()
            last.step()
            steps += 1
            numbers.append(float(loss.detach()))
            if steps == until:
                if word == "full" and rank == 1:  # a quota that is reached: write() says EFBIG
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                if rank == 0:
                    rundir.write_json(run.stop, {"signal": "SIGUSR2", "restart": restart})
        scheduler.step()
except Stopped as error:
    stopped = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
whole = [parameter.full_tensor().detach() for parameter in model.parameters()]
own = [parameter.to_local().detach() for parameter in model.parameters()] + [b.float() for b in model.buffers()]
digest = hashlib.sha256(b"".join(one.contiguous().numpy().tobytes() for one in own)).hexdigest()
told = {
    "said": said, "stopped": stopped, "steps": steps, "losses": numbers, "digest": digest, "lr": scheduler.get_last_lr(),
    "whole": [one.flatten().tolist() for one in whole], "otherwise": keeper.otherwise,
}
(folder / f"told.{rank}.json").write_text(json.dumps(told))
dist.destroy_process_group()
os._exit(0)  # Gloo's threads may still let go of tensors, which aborts a Python that is about to end (pytorch#190489)
"""


def ranks(folder: Path, *, restart: int = 0, until: int = 0, word: str = "-", world: int = 2) -> list[dict[str, Any]]:
    """Play ``SHARED`` on some ranks; returns what each told."""
    folder.mkdir(exist_ok=True)
    (folder / "shared.py").write_text(SHARED)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(topology.free_first_port(1)), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    played = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "shared.py", str(folder), str(rank), str(restart), str(until), word],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in played]
    finally:
        for process in played:
            process.kill()
    assert [process.returncode for process in played] == [0] * world, "\n".join(said)
    return [json.loads((folder / f"told.{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A training on two ranks that was stopped in its second epoch, and what they told."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, ranks(folder, until=11)


def copy_of(stopped: tuple[Path, list[dict[str, Any]]], folder: Path) -> Path:
    return Path(shutil.copytree(stopped[0] / "r", folder / "r")).parent


def test_a_shared_model_that_is_stopped_goes_on_with_the_same_bits(
    stopped: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    through = ranks(tmp_path / "through")
    first, again = stopped[1], ranks(copy_of(stopped, tmp_path), restart=1)
    assert all("a checkpoint is kept at step 11, 3 steps into epoch 2" in one["stopped"] for one in first)
    for rank in (0, 1):
        assert first[rank]["losses"] + again[rank]["losses"] == through[rank]["losses"]
        assert [again[rank][name] == through[rank][name] for name in ("digest", "lr", "whole")] == [True] * 3
    assert again[0]["otherwise"] == "" and again[0]["said"] == []
    assert again[0]["digest"] != again[1]["digest"], "each has parts and buffers of its own"


@pytest.mark.parametrize("world", [1, 3])
def test_a_shared_model_goes_on_with_other_ranks(
    stopped: tuple[Path, list[dict[str, Any]]], tmp_path: Path, world: int
) -> None:
    again = ranks(copy_of(stopped, tmp_path), restart=1, until=1, world=world)
    for one in again:
        assert "a checkpoint is kept at step 12, 4 steps into epoch 2" in one["stopped"]
        assert f"saved by 2 ranks and loaded by {world}" in one["otherwise"]
        assert one["whole"] == again[0]["whole"]
    pairs = [(old, new) for old, new in zip(stopped[1][0]["whole"], again[0]["whole"], strict=True)]
    apart = [max(abs(a - b) for a, b in zip(old, new, strict=True)) for old, new in pairs]
    # one step of AdamW, whose moments are kept, at a learning rate of 0.02, and of SGD
    assert 0 < apart[0] < 0.03 and max(apart) < 0.1


def test_a_truncated_part_is_passed_over_with_a_word(
    stopped: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = RunDir(copy_of(stopped, tmp_path), "r")
    (kept,) = run.checkpoints.glob("step-*")
    model = json.loads((kept / "checkpoint.json").read_text())["model"]
    told: list[str] = []
    assert Store(run, 1, model, told.append).latest() is not None and told == []
    (part,) = kept.glob("__1_*")
    os.truncate(part, part.stat().st_size - 1)
    assert Store(run, 1, model, told.append).latest() is None
    assert re.fullmatch(rf"checkpoint {kept.name} is passed over: {part.name} has \d+ bytes, not \d+", told[0])


def test_a_rank_that_has_no_room_for_its_part_costs_one_checkpoint(tmp_path: Path) -> None:
    told = ranks(tmp_path, until=11, word="full")
    for one in told:
        assert one["stopped"].endswith("after step 11; the checkpoint before is kept")
    assert told[0]["said"] == [
        "no checkpoint at step 11, 3 steps into epoch 2: rank 1: File too large; the one before is kept"
    ]
    assert not list(RunDir(tmp_path, "r").checkpoints.glob("*step*")), "and nothing is left of it"


# ------------------------------------------------------------------ whole runs, killed within an epoch

TRAIN = """
import hashlib, os, random, signal, time
import hpcml

kind, killed = os.environ["KIND"], os.environ["KILLED"] == "1" and os.environ["HPCML_RESTART"] == "0"
run = hpcml.begin(strategy="horovod" if kind == "horovod" else "ddp")
if kind == "horovod":
    import horovod.torch as hvd
    import torch

    hvd.init()
    rank = hvd.rank()
else:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank = dist.get_rank()
torch.manual_seed(3)
random.seed(rank)
inputs = torch.arange(4800.0).reshape(-1, 4) / 4800
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=rank, seed=5)
loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
)
if kind == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
if kind == "fsdp":
    model = fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
if kind == "horovod":
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
torch.manual_seed(rank)
for epoch in run.epochs(2, model, global_batch=8, keep=[optimizer]):
    sampler.set_epoch(epoch)
    for x, y in run.steps(loader):
        loss = torch.nn.functional.mse_loss(model(x) + random.random() / 1000, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if killed:
            time.sleep(0.03)  # an epoch of 5 s, and a checkpoint after 2 s
            if rank == 1 and next(run.dir.checkpoints.glob("step-*"), None):
                os.kill(os.getpid(), signal.SIGKILL)
parts = [p.to_local() if hasattr(p, "to_local") else p for p in [*model.parameters(), *model.buffers()]]
digest = hashlib.sha256(b"".join(p.detach().contiguous().numpy().tobytes() for p in parts)).hexdigest()
print(f"WEIGHTS {digest} {sampler.epoch}", flush=True)
"""
JOB = """
script = "train.py"
strategy = "{strategy}"
[resources]
gpus_per_node = 2
tasks_per_node = 2
cpus_per_task = 1
[env]
vars = {{KIND = "{kind}", KILLED = "{killed}"}}
"""


def hpcml(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], RunDir]:
    own = {"HPCML_SITE": "local", "HPCML_DEVICES": "cpu", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    argv = [sys.executable, "-m", "hpcml", *words]
    done = subprocess.run(argv, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    (run,) = (folder / "runs").glob("*-job")
    return done, RunDir(run.parent, run.name)


def trained(folder: Path, kind: str, killed: int) -> tuple[subprocess.CompletedProcess[str], RunDir]:
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(TRAIN)
    strategy = "horovod" if kind == "horovod" else "ddp"
    (folder / "job.toml").write_text(JOB.format(strategy=strategy, kind=kind, killed=killed))
    return hpcml(folder, "run", "job.toml")


def weights(run: RunDir) -> list[str]:
    return [re.findall(r"^WEIGHTS .*", run.log(rank).read_text(), re.MULTILINE)[-1] for rank in (0, 1)]


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp",
        pytest.param(
            "horovod",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("horovod") is None, reason="Horovod: scripts/setup --horovod"
            ),
        ),
    ],
)
def test_a_rank_that_is_killed_costs_a_part_of_an_epoch_and_no_bit(tmp_path: Path, kind: str) -> None:
    done, through = trained(tmp_path / "through", kind, killed=0)
    assert done.returncode == 0, done.stdout + done.stderr
    done, run = trained(tmp_path / "killed", kind, killed=1)
    assert done.returncode != 0
    restart, step = rundir.kept_at(run)
    assert restart == 0 and 0 < step < 150, "within the first of two epochs"
    done, run = hpcml(tmp_path / "killed", "resume", run.id)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on from step {step}, {step} steps into epoch 1" in run.log(0).read_text()
    assert weights(run) == weights(through)
