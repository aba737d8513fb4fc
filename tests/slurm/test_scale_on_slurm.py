"""More nodes by a number in the job file, 64 ranks of bootstrap, and a rank that dies, on a real Slurm of four nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from calls import HPCML, LIMIT_S, call, logs, only_run, until
from conftest import Cluster, session_cluster, skip_without_slurm

from hpcml.tracking import journal

REPOSITORY = Path(__file__).resolve().parents[2]
# What a job may take to end after one of its ranks has died.
END_S = 30


@pytest.fixture(scope="module")
def cluster4(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four nodes with two GPUs each."""
    skip_without_slurm()
    yield from session_cluster(request.getfixturevalue("devcluster_base"), "four", "--nodes", "4")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own; runs and MLflow's data land in it."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return folder


def submitted(cluster: Cluster, project: Path, file: str, **resources: int) -> Path:
    """Queue a job with other numbers in its ``[resources]``, and return its run directory."""
    numbers = [word for name, value in resources.items() for word in ("--set", f"resources.{name}={value}")]
    done = call(cluster, project, *HPCML, "submit", file, *numbers, "--json")
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["path"])


def ended(run: Path, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Wait for a run's end marker and return it."""
    deadline = time.monotonic() + limit_s
    while not (run / "status.json").exists():
        assert time.monotonic() < deadline, f"the job has not ended within {limit_s} s: {logs(run)}"
        time.sleep(0.05)
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Return the last value of each rank's metrics."""
    values: dict[int, dict[str, float]] = {}
    for record in journal.read(run / "events", kinds={"metric"}):
        if record["writer"] == "rank":
            values.setdefault(record["rank"], {}).update(record["values"])
    return values


# ------------------------------------------------------------------ the batch file as committed


def with_notebooks(project: Path) -> None:
    for name in ("jobs", "notebooks"):
        ignored = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(REPOSITORY / name, project / name, ignore=ignored, dirs_exist_ok=True)


@pytest.mark.parametrize("how", ["sbatch", "submit"])
def test_torch_ddp_trains_two_replicas(cluster4: Cluster, project: Path, how: str) -> None:
    with_notebooks(project)
    words = {
        "sbatch": ["sbatch", "--wait", "jobs/mnist_ddp.sbatch"],
        "submit": [*HPCML, "submit", "jobs/mnist_ddp.toml", "-p", "epochs=1", "--wait"],
    }
    done = call(cluster4, project, *words[how])
    run = only_run(project)
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    end = ended(run)
    assert (end["state"], end["replicas_in_sync"], end["final"]) == ("COMPLETED", 2, True)
    found = metrics(run)
    assert found[0]["val_accuracy"] == found[1]["val_accuracy"] > {"sbatch": 0.85, "submit": 0.7}[how]
    assert {path.name for path in run.glob("notebook*.ipynb")} == {"notebook.ipynb", "notebook.1.ipynb"}


# ------------------------------------------------------------------ more nodes, by a number in the job file

STEPS, GLOBAL_BATCH, LR, FEATURES = 3, 48, 0.1, 4

DATA = f"""
import json
import nbformat
import numpy as np

random = np.random.RandomState(7)
x = random.standard_normal(({STEPS * GLOBAL_BATCH}, {FEATURES})).astype("float32")
y = random.standard_normal(({STEPS * GLOBAL_BATCH}, 1)).astype("float32")
"""

DDP = f"""
import hpcml
run = hpcml.begin(strategy="ddp")
import torch
{DATA}
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
layer = torch.nn.Linear({FEATURES}, 1)
torch.nn.init.constant_(layer.weight, 0.5 + rank)  # the wrapper must bring all to rank 0's
torch.nn.init.zeros_(layer.bias)
model = torch.nn.parallel.DistributedDataParallel(layer)
optimizer = torch.optim.SGD(model.parameters(), {LR})
dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
sampler = torch.utils.data.DistributedSampler(dataset, shuffle=False)
loader = torch.utils.data.DataLoader(dataset, {GLOBAL_BATCH} // world, sampler=sampler)
for epoch in run.epochs(1, model, global_batch={GLOBAL_BATCH}):
    for inputs, labels in run.steps(loader):
        loss = torch.nn.functional.mse_loss(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.distributed.all_reduce(loss.detach_())
    run.log(step=epoch, loss=loss.item() / world)
weights = [*layer.weight.detach().ravel().tolist(), layer.bias.item()]
(run.dir.path / f"weights.{{rank}}.json").write_text(json.dumps(weights))
run.finish()
"""

MULTIWORKER = f"""
import hpcml
run = hpcml.begin(strategy="multiworker")
import tensorflow as tf
{DATA}
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    start = tf.keras.initializers.Constant(0.5)
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, kernel_initializer=start, input_shape=({FEATURES},))])
    model.compile(tf.keras.optimizers.SGD({LR}), "mse")
data = tf.data.Dataset.from_tensor_slices((x, y)).batch({GLOBAL_BATCH})
model.fit(data, epochs=1, verbose=0, callbacks=run.callbacks(global_batch={GLOBAL_BATCH}))
kernel, bias = model.get_weights()
weights = [*kernel.ravel().tolist(), *bias.tolist()]
(run.dir.path / f"weights.{{run.topology.rank}}.json").write_text(json.dumps(weights))
run.finish()
"""


def descended() -> list[float]:
    """Return the weights and bias after the same steps on whole global batches, in NumPy: what all ranks must have."""
    names: dict[str, Any] = {}
    exec(DATA, names)
    x, y = names["x"].astype(float), names["y"].astype(float)
    kernel, bias = np.full((FEATURES, 1), 0.5), 0.0
    for step in range(STEPS):
        part = slice(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        error = 2 * (x[part] @ kernel + bias - y[part]) / GLOBAL_BATCH
        kernel, bias = kernel - LR * x[part].T @ error, bias - LR * error.sum()
    return [*kernel.ravel().tolist(), float(bias)]


def job(project: Path, name: str, script: str, **keys: object) -> str:
    """Write a script and its job file of one node with two tasks; return the file's path."""
    (project / f"{name}.py").write_text(script)
    top = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    resources = "[resources]\ngpus_per_node = 2\ntasks_per_node = 2\ncpus_per_task = 1\nmem_gb = 4\n"
    (project / f"jobs/{name}.toml").write_text(f'script = "{name}.py"\n{top}{resources}')
    return f"jobs/{name}.toml"


# Eight processes of TensorFlow on two cores take a minute to import alone; eight of torch a quarter of that.
@pytest.mark.parametrize(("strategy", "nodes"), [("ddp", 2), ("ddp", 4), ("multiworker", 2)])
def test_ranks_on_several_nodes_train_as_one(cluster4: Cluster, project: Path, strategy: str, nodes: int) -> None:
    file = job(project, "small", {"ddp": DDP, "multiworker": MULTIWORKER}[strategy], strategy=strategy)
    run = submitted(cluster4, project, file, nodes=nodes)
    end, world = ended(run), 2 * nodes
    assert (end["state"], end["replicas_in_sync"]) == ("COMPLETED", world), logs(run)
    params = {r["rank"]: r["values"] for r in journal.read(run / "events", kinds={"params"}) if "nodes" in r["values"]}
    assert {rank: (told["world_size"], told["nodes"]) for rank, told in params.items()} == dict.fromkeys(
        range(world), (world, nodes)
    )
    weights = [json.loads((run / f"weights.{rank}.json").read_text()) for rank in range(world)]
    assert all(own == weights[0] for own in weights), weights
    np.testing.assert_allclose(weights[0], descended(), rtol=0, atol=1e-5)
    found = metrics(run)
    assert set(found) == set(range(world))
    assert len({values["loss"] for values in found.values()}) == 1, found
    assert all(values["samples_per_s"] > 0 for values in found.values())


# ------------------------------------------------------------------ 64 ranks, no framework

WHO = """
import json, os, socket, sys, time
began = time.time()
from hpcml.node import batch, bootstrap

run = batch.current_run().path
own = bootstrap.received(os.environ).topology
told, took_s = {}, {}
for strategy in ("multiworker", "ddp"):
    at = time.perf_counter()
    told[strategy] = dict(bootstrap.prepare(os.environ, strategy, gpus_per_node=0).variables)
    took_s[strategy] = time.perf_counter() - at
host, _, port = json.loads(told["multiworker"]["TF_CONFIG"])["cluster"]["worker"][own.rank].rpartition(":")
held = socket.socket()  # without SO_REUSEADDR: a port that anybody has is refused
held.bind(("0.0.0.0", int(port)))
held.listen()
(run / f"here.{own.rank}").touch()
while len(list(run.glob("here.*"))) < own.world:  # all hold their ports at once
    time.sleep(0.5)
frameworks = sorted({"tensorflow", "torch", "keras", "tf_keras", "numpy"} & set(sys.modules))
slurm = [int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")]
print("WHO", json.dumps({"rank": own.rank, "local_rank": own.local_rank, "node": own.node, "world": own.world,
    "nodes": own.nodes, "local_world": own.local_world, "hosts": own.hosts, "slurm": slurm, "told": told,
    "node_name": os.environ["SLURMD_NODENAME"], "frameworks": frameworks, "took_s": took_s, "began": began,
    "held": time.time()}))
"""


def test_64_ranks_agree_on_who_is_where(cluster4: Cluster, project: Path) -> None:
    """Four nodes × 16 tasks: each rank has its own place and port, and the same picture of all others."""
    file = job(project, "who", WHO)
    run = submitted(cluster4, project, file, nodes=4, tasks_per_node=16, gpus_per_node=0)
    end = ended(run)
    assert end["state"] == "COMPLETED", logs(run)
    said = [
        json.loads(line[4:])
        for path in sorted((run / "logs").glob("out.*.txt"))
        for line in path.read_text().splitlines()
        if line.startswith("WHO ")
    ]
    said.sort(key=lambda one: one["rank"])
    assert [one["rank"] for one in said] == list(range(64))
    assert not any(one["frameworks"] for one in said)
    for one in said:
        assert [one["rank"], one["local_rank"], one["node"]] == one["slurm"]
        assert (one["world"], one["nodes"], one["local_world"]) == (64, 4, 16)
        assert one["hosts"][one["node"]] == one["node_name"]
    for node in range(4):
        assert [one["local_rank"] for one in said if one["node"] == node] == list(range(16))

    configs = [json.loads(one["told"]["multiworker"]["TF_CONFIG"]) for one in said]
    assert [config["task"] for config in configs] == [{"type": "worker", "index": rank} for rank in range(64)]
    (cluster,) = {json.dumps(config["cluster"]) for config in configs}
    workers = json.loads(cluster)["worker"]
    assert len({worker.rpartition(":")[2] for worker in workers}) == 64, "all nodes are one host here: no port twice"

    torch = [one["told"]["ddp"] for one in said]
    assert {(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in torch} == {tuple(workers[0].split(":"))}
    places = [(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) for env in torch]
    assert places == [(str(rank), "64", str(one["local_rank"]), "16") for rank, one in enumerate(said)]
    slowest = max(max(one["took_s"].values()) for one in said)
    first, last, held = (
        pick(float(one[key]) for one in said) for pick, key in ((min, "began"), (max, "began"), (max, "held"))
    )
    print(
        f"64 ranks: {slowest:.2f} s the slowest bootstrap; seconds after the first rank's start: {last - first:.1f} the last",
        end="",
    )
    print(f" one's, {held - first:.1f} all hold their ports, {end['ended'] - first:.1f} the run's end")


# ------------------------------------------------------------------ a rank that dies

# Trains without end. Each rank tells its process id after its third step.
ENDLESS = """
import os, sys
import hpcml
run = hpcml.begin(strategy="ddp")
import torch
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
for epoch in run.epochs(1, model, global_batch=world):
    for step, _ in enumerate(run.steps(iter(lambda: 0, 1)), 1):
        {dies}
        model(torch.ones(1, 4)).sum().backward()
        if step == 3:
            (run.dir.path / f"pid.{{rank}}").write_text(str(os.getpid()))
"""
EXITS = 'if rank == 1: sys.exit("rank 1 has had enough")'


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_dead_rank_ends_the_job_and_is_named(cluster4: Cluster, project: Path, how: str) -> None:
    file = job(project, "endless", ENDLESS.format(dies="pass" if how == "killed" else EXITS), strategy="ddp")
    run = submitted(cluster4, project, file, nodes=2)
    if how == "killed":
        until(lambda: (run / "pid.1").exists() and bool((run / "pid.1").read_text()), "rank 1 trains")
        os.kill(int((run / "pid.1").read_text()), signal.SIGKILL)
    else:
        until(lambda: any(run.glob("status.*.json")), "a rank has ended")
    died = time.monotonic()
    end = ended(run, END_S)
    print(f"{how}: the job ended {time.monotonic() - died:.1f} s later: {end['reason']}")
    assert (end["state"], end["failed_rank"]) == ("FAILED", 1), (end, logs(run))
    assert {"killed": "SIGKILL", "exits": "has had enough"}[how] in end["reason"]


# What a collective does, without a framework: each rank hears at once when another one's process has gone.
WIRED = """
import os, socket, time
from hpcml.node import batch, bootstrap, topology
place = bootstrap.received(os.environ).topology
host, _, port = topology.addresses(place, os.environ)[0].rpartition(":")
if place.rank == 0:
    peers = socket.create_server((host, int(port))).accept()[0]
else:
    while True:
        try:
            peers = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
run = batch.current_run().path
{more}
(run / f"pid.{{place.rank}}").write_text(f"{{os.getpid()}} {{os.getppid()}}")
if not peers.recv(1):
    raise RuntimeError("Connection closed by peer")
"""


# A rank that neither hears of the other's end nor heeds TERM.
DEAF = """
import signal
if place.rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run / "pid.0").write_text("deaf")
    time.sleep(600)
"""


def wired(project: Path, work: str, more: str = "") -> str:
    """Write a job of two tasks whose ranks hold a connection to each other, as a script or a notebook."""
    resources = "[resources]\nnodes = 2\ncpus_per_task = 1\nmem_gb = 1\n"
    if work == "notebook":
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WIRED.format(more=more))])
        nbformat.write(notebook, project / "wired.ipynb")
        (project / "jobs/wired.toml").write_text(f'notebook = "wired.ipynb"\n{resources}')
    else:
        (project / "wired.py").write_text(WIRED.format(more=more))
        (project / "jobs/wired.toml").write_text(f'script = "wired.py"\n{resources}')
    return "jobs/wired.toml"


@pytest.mark.parametrize("victim", ["work", "kernel", "worker", "work beside a deaf one"])
def test_the_first_of_the_dead_is_named_not_who_lost_its_peer(cluster4: Cluster, project: Path, victim: str) -> None:
    work = "notebook" if victim == "kernel" else "script"
    run = submitted(cluster4, project, wired(project, work, DEAF if "deaf" in victim else ""))
    told = [run / "pid.0", run / "pid.1"]
    until(lambda: all(path.exists() and path.read_text() for path in told), "both ranks are there")
    own, parent = map(int, told[1].read_text().split())
    os.kill(parent if victim == "worker" else own, signal.SIGKILL)
    died = time.monotonic()
    end = ended(run, END_S)
    print(f"{victim}: the job ended {time.monotonic() - died:.1f} s later: {end['reason']}")
    assert (end["state"], end["failed_rank"]) == ("FAILED", 1), (end, logs(run))
    assert "SIGKILL" in end["reason"], (end, logs(run))
