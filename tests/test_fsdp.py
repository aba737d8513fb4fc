"""torch's ``fully_shard`` under strategy ``ddp``: what the checks see of a model that is shared out, and the notebook.

Two ranks under Gloo, as real processes, play all the scenes of ``SCENES`` and tell as JSON what came of each; the notebooks
run as jobs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import facts, job, plan, rundir, site
from hpcml.node import topology

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch: not installed (scripts/setup --torch)"
)

SCENES = """
import datetime, json, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpcml.errors import HpcmlError
from hpcml.tracking.journal import Journal
from hpcml.training import ddp, torch as training
from hpcml.training.common import Expected

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
told = {}
torch.manual_seed(5)
x, y = torch.randn(64, 4), torch.randn(64, 1)
data = TensorDataset(x, y)


def network(seed=7):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))  # 7 and 1: uneven parts


def begin(model, expected=None, epochs=1):
    return training.Training(
        Journal(folder / f"{rank}.0.rank.jsonl"), expected or Expected("ddp", world=2, virtual=True), torch.device("cpu"),
        model=model, epochs=epochs, global_batch=8, began=time.perf_counter(), rank=rank, stop=ddp.Stop(folder / "none"))


def train(loop, model, each=lambda number: None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))
    number = 0
    for epoch in loop.epochs():
        for images, labels in loop.steps(loader):
            number += 1
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(images), labels).backward()
            optimizer.step()
            each(number)
        with torch.no_grad():
            model(x)  # after this fully_shard keeps the root's weights whole
    return number


def tell(name, scene):
    try:
        told[name] = scene()
    except HpcmlError as error:
        told[name] = str(error)


dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
MINE = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("alone", "own"))["own"]  # a mesh of this rank only
COPIES = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "part"))


def shared():
    model = fully_shard(network())
    parts = [tuple(parameter.to_local().shape) for parameter in model.parameters()]
    steps = train(begin(model, epochs=2), model)
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for _ in range(2):  # the same global batches by one process
        for first in range(0, 64, 8):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(alone(x[first : first + 8]), y[first : first + 8]).backward()
            optimizer.step()
    model.reshard()
    whole = [parameter.full_tensor() for parameter in model.parameters()]
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(whole, alone.parameters()))
    told["parts"] = parts
    return {"steps": steps, "apart": apart, "same": ddp.same_weights(model)}


tell("shared", shared)


def hashes():
    # Of the whole model: another value in any part, also in the other rank's, is another hash for all.
    models = [fully_shard(network()), fully_shard(network()), fully_shard(network(8)), fully_shard(network())]
    if rank == 1:
        with torch.no_grad():
            next(models[3].parameters()).to_local()[0, 0] += 1e-6
    return [ddp.weights_hash(model).hex() for model in models]


tell("hashes", hashes)


def after_evaluation():
    model = fully_shard(network())
    before = ddp.weights_hash(model)
    with torch.no_grad():
        model(x)
    kept_whole = not hasattr(next(model.parameters()), "to_local")
    begin(model)
    return kept_whole and ddp.weights_hash(model) == before


tell("after evaluation", after_evaluation)


def left_out():
    model = network()
    fully_shard(model[0])  # and model[2] on each rank for itself
    return train(begin(model), model)


tell("a layer left out", left_out)


def copies(drift):
    model = fully_shard(network(), mesh=COPIES)

    def each(number):
        if number == 3 and drift and rank == 1:
            with torch.no_grad():
                next(model.parameters()).to_local()[0, 0] += 1e-6

    return train(begin(model), model, each)


tell("copies", lambda: copies(False))
tell("copies that drift apart", lambda: copies(True))
tell("plain", lambda: begin(network()) and None)
tell("each by itself", lambda: begin(fully_shard(network(), mesh=MINE)) and None)
tell("not on the gpu", lambda: begin(fully_shard(network()), Expected("ddp", world=2, gpus_per_task=1)) and None)
dist.destroy_process_group()
(folder / f"told.{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks told."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "scenes.py").write_text(SCENES)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(topology.free_first_port(1)), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "scenes.py", str(folder), str(rank)],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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
    return [json.loads((folder / f"told.{rank}.json").read_text()) for rank in (0, 1)]


def both(scenes: list[dict[str, Any]], name: str) -> Any:
    """What the two ranks told of a scene, which must be the same."""
    told = [one[name] for one in scenes]
    assert told[0] == told[1]
    return told[0]


def test_two_ranks_that_share_a_model_learn_what_one_process_would(scenes: list[dict[str, Any]]) -> None:
    told = both(scenes, "shared")
    assert (told["steps"], told["same"]) == (16, [True, True])
    assert told["apart"] < 1e-5
    # weight and bias of 7, then of 1: the second rank has nothing of the last layer
    assert [one["parts"] for one in scenes] == [[[4, 4], [4], [1, 7], [1]], [[3, 4], [3], [0, 7], [0]]]


def test_a_hash_stands_for_the_whole_model_on_every_rank(scenes: list[dict[str, Any]]) -> None:
    one, same, other, changed = both(scenes, "hashes")
    assert one == same and len({one, other, changed}) == 3


def test_weights_that_an_evaluation_left_whole_are_shared_again(scenes: list[dict[str, Any]]) -> None:
    assert both(scenes, "after evaluation") is True


def test_copies_of_a_shared_model_are_compared(scenes: list[dict[str, Any]]) -> None:
    assert both(scenes, "copies") == 8
    # an epoch of 8 steps: compared after the first and the last
    assert "the weights of rank 1 differ from rank 0's after step 8" in both(scenes, "copies that drift apart")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plain", "each of the 2 tasks trains the whole job by itself: the model is not wrapped"),
        ("a layer left out", "the weights of rank 1 differ from rank 0's after step 1"),
        ("not on the gpu", "the model is on cpu, this task was given a GPU"),
    ],
)
def test_what_is_not_shared_by_all_ranks_ends_on_all_of_them(
    scenes: list[dict[str, Any]], name: str, says: str
) -> None:
    assert says in both(scenes, name)


def test_a_rank_that_shares_with_itself_is_told_so(scenes: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(scenes):
        assert (
            f"the parts of 0.weight lie on rank {rank} of 2: they train a model of their own" in told["each by itself"]
        )


# ------------------------------------------------------------------ the notebook

needs_notebooks = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("papermill", "mlxtend")),
    reason="notebooks: not installed (pip install 'hpcml[notebook,data]')",
)


def run_job(name: str, runs: Path) -> tuple[dict[str, Any], list[str]]:
    """Run a job of the project here on two ranks; returns its end marker and what each rank printed."""
    own = {
        "HPCML_SITE": "local",
        "HPCML_DEVICES": "cpu",
        "HPCML_RUNS": str(runs),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    words = [sys.executable, "-m", "hpcml", "run", f"jobs/{name}.toml", "-p", "epochs=3"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (path for path in runs.iterdir() if path.name.endswith(name.replace("_", "-")))
    run = rundir.RunDir(runs, path.name)
    return rundir.read_json(run.status), [run.log(rank).read_text() for rank in (0, 1)]


def only(pattern: str, text: str) -> str:
    (found,) = set(re.findall(pattern, text))
    return str(found)


@needs_notebooks
def test_the_notebook_learns_what_the_one_with_whole_models_does(tmp_path: Path) -> None:
    results = {}
    for name in ("mnist_ddp", "mnist_fsdp"):
        marker, said = run_job(name, tmp_path)
        assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 2)
        numbers = [only(r"weights, ([0-9a-f]{12})", said[0]), only(r"data ([0-9a-f]{12})", said[0])]
        results[name] = float(only(r"\naccuracy (\S+),", said[0])), numbers, said
    (ddp, same, _), (fsdp, again, said) = results.values()
    assert same == again, "the same data and first weights"
    assert abs(ddp - fsdp) < 0.02 and fsdp > 0.6
    for text in said:
        assert only(r"put together again: ([0-9a-f]{12})", text) == same[0]
    # 6,606 weights in float32 with a gradient and two moments; 57 rows shared out in halves
    whole, *parts = map(int, re.findall(r"[\d,]*\d{3}", only(r"moments: (.*)", said[0]).replace(",", "")))
    assert whole == 6606 * 16 and len(parts) == 2 and sum(parts) == whole and min(parts) > 0.4 * whole


@needs_notebooks
def test_the_notebook_is_what_its_script_gives() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext: not installed (pip install 'hpcml[notebook]')")
    path = ROOT / "notebooks/simple2GPUsFSDP.py"
    written = json.loads(jupytext.writes(jupytext.read(path), fmt="ipynb"))
    kept = json.loads(path.with_suffix(".ipynb").read_text())
    fix = "after a change in the script: jupytext --to ipynb notebooks/simple2GPUsFSDP.py"
    assert [(c["cell_type"], c["source"], c["metadata"]) for c in kept["cells"]] == [
        (c["cell_type"], c["source"], c["metadata"]) for c in written["cells"]
    ], fix


def test_the_job_is_that_of_whole_models_but_for_the_notebook() -> None:
    ours, theirs = (job.load(ROOT / "jobs" / f"mnist_{name}.toml") for name in ("fsdp", "ddp"))
    assert (ours.resources, ours.params, ours.strategy) == (theirs.resources, theirs.params, theirs.strategy)
    assert ours.params == facts.declared_parameters(ROOT / "notebooks/simple2GPUsFSDP.ipynb").defaults
    assert plan.unfair({one.name: plan.resolve(one, site.load("generic")) for one in (ours, theirs)}) == []
