"""Strategy ``horovod``: what its ranks are told, its build, and whole runs of two local ranks with torch and with Keras.

Horovod is built from source, so what needs it runs only where somebody has built it. The rest runs everywhere.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcml import facts, job, plan, rundir, site
from hpcml.errors import HpcmlError
from hpcml.launch import prepare
from hpcml.node import bootstrap
from hpcml.tracking import journal
from hpcml.training import horovod
from hpcml.training.common import Expected

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "envs/horovod"
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod: scripts/setup --horovod"
)

# ------------------------------------------------------------------ what a rank is told


def told(environment: dict[str, str], **more: Any) -> dict[str, str]:
    """What a rank's bootstrap tells Horovod."""
    variables = bootstrap.prepare({"HPCML_DEVICES": "cpu", **environment}, "horovod", gpus_per_node=2, **more).variables
    return {name.removeprefix("HOROVOD_"): value for name, value in variables.items() if name.startswith("HOROVOD_")}


def here(rank: int, **more: str) -> dict[str, str]:
    return {"HPCML_RANK": str(rank), "HPCML_WORLD_SIZE": "2", "HPCML_PORT": "61234", **more}


def test_two_ranks_of_one_machine_meet_on_the_loopback_interface() -> None:
    ranks = [told(here(rank)) for rank in (0, 1)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["CROSS_RANK"]) for r in ranks] == [("0", "0", "0"), ("1", "1", "0")]
    assert [(r["SIZE"], r["LOCAL_SIZE"], r["CROSS_SIZE"]) for r in ranks] == [("2", "2", "1")] * 2
    shared = {"GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": "61234", "GLOO_IFACE": "lo"}
    shared |= {"CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo"}
    assert all(shared.items() <= r.items() for r in ranks)
    assert ranks[0]["HOSTNAME"] == ranks[1]["HOSTNAME"]


def test_ranks_of_nodes_that_have_more_and_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks on two nodes: the one that is alone with its local rank has nobody across."""
    monkeypatch.setattr(
        "hpcml.node.topology.addresses", lambda *given: ["10.0.0.1:61000", "10.0.0.1:61001", "10.0.0.2:61002"]
    )
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    step |= {"SLURM_STEP_NODELIST": "gpu[01-02]"}
    places = [("0", "0", "0"), ("1", "0", "1"), ("2", "1", "0")]  # rank, node, local rank
    ranks = [
        bootstrap.prepare(
            {**step, "SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local, "HPCML_DEVICES": "cpu"},
            "horovod",
            gpus_per_node=2,
        ).variables
        for rank, node, local in places
    ]
    assert [r["HPCML_PEER"] for r in ranks] == ["10.0.0.2", "10.0.0.2", "10.0.0.1"]
    ranks = [{name.removeprefix("HOROVOD_"): value for name, value in r.items()} for r in ranks]
    assert [(r["CROSS_RANK"], r["CROSS_SIZE"], r["LOCAL_SIZE"]) for r in ranks] == [
        ("0", "2", "2"),
        ("0", "1", "2"),
        ("1", "2", "1"),
    ]
    assert [r["HOSTNAME"] for r in ranks] == ["gpu01", "gpu01", "gpu02"]
    assert "GLOO_IFACE" not in ranks[0], "which interface leads to the others is known on the node alone"


def test_what_the_user_set_wins_and_one_process_meets_nobody() -> None:
    own = {"HOROVOD_GLOO_IFACE": "ib0", "HOROVOD_GLOO_TIMEOUT_SECONDS": "5", "HOROVOD_CPU_OPERATIONS": "ccl"}
    rank = told(here(1, **own))
    assert (rank["GLOO_IFACE"], rank["GLOO_TIMEOUT_SECONDS"], rank["CPU_OPERATIONS"]) == ("ib0", "5", "ccl")
    assert "GLOO_RENDEZVOUS_ADDR" not in told({}) and told({})["SIZE"] == "1"


def test_a_run_inside_a_run_is_not_one_of_its_ranks() -> None:
    inner = bootstrap.prepare(here(1, HPCML_DEVICES="cpu"), "horovod", gpus_per_node=2).variables
    assert not [name for name in bootstrap.outer_environment(inner) if name.startswith("HOROVOD_")]


def test_horovodrun_is_told_that_it_is_not_needed() -> None:
    with pytest.raises(HpcmlError, match=r"HOROVOD_SIZE=2(?s:.*)horovodrun(?s:.*)hpcml run"):
        told({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"})


@pytest.mark.parametrize("how", [{"keras": "3"}, {"environment": {"TF_USE_LEGACY_KERAS": "0"}}])
def test_keras_3_is_refused_on_the_node(how: dict[str, Any]) -> None:
    given = {"HPCML_DEVICES": "cpu", **how.get("environment", {})}
    with pytest.raises(HpcmlError, match="averages no gradients with Keras 3"):
        bootstrap.prepare(given, "horovod", how.get("keras", "legacy"))
    assert bootstrap.prepare({"HPCML_DEVICES": "cpu"}, "horovod").variables["TF_USE_LEGACY_KERAS"] == "1"


# ------------------------------------------------------------------ where the ranks meet


@pytest.fixture
def another_run() -> Iterator[int]:
    """The port of a rendezvous that serves the run ``other``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/hpcml/run" else 404)
            self.end_headers()
            self.wfile.write(b"other")

        def log_message(self, *words: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_rank_waits_for_its_own_run_and_says_whom_it_found(another_run: int) -> None:
    horovod.wait_for_rank_0("127.0.0.1", another_run, "other", limit_s=10)
    with pytest.raises(HpcmlError, match=rf"127.0.0.1:{another_run}(?s:.*)run other did(?s:.*)HPCML_PORT"):
        horovod.wait_for_rank_0("127.0.0.1", another_run, "mine", limit_s=0.2)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(HpcmlError, match=r"did not answer(?s:.*)look at rank 0's log"):
            horovod.wait_for_rank_0("127.0.0.1", nobody.getsockname()[1], "mine", limit_s=0.2)


def test_the_interface_that_leads_to_rank_0() -> None:
    pytest.importorskip("psutil", reason="psutil: not installed (pip install 'hpcml[telemetry]')")
    assert horovod.interface_towards("127.0.0.1") == "lo"


# ------------------------------------------------------------------ where it is missing


@pytest.fixture
def without_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "horovod" else found(name, *more)
    )


def resolved(folder: Path, text: str = "") -> plan.Plan:
    (folder / "pyproject.toml").touch()
    (folder / "job.toml").write_text(f'command = ["true"]\nstrategy = "horovod"\n{text}')
    return plan.resolve(job.load(folder / "job.toml"), site.load("generic"))


@pytest.mark.usefixtures("without_horovod")
def test_a_job_without_horovod_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCML_PYTHON", sys.executable)
    with pytest.raises(HpcmlError, match=r"'horovod' needs horovod(?s:.*)scripts/setup --horovod(?s:.*)ddp"):
        prepare.needs_framework(resolved(tmp_path))


@pytest.mark.usefixtures("without_horovod")
def test_begin_without_horovod_says_what_builds_it_and_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    with pytest.raises(HpcmlError, match=r"needs Horovod(?s:.*)scripts/setup --horovod(?s:.*)ddp(?s:.*)multiworker"):
        horovod.begin(Expected("horovod"), 0, "run", {}, precision="float32")
    assert sys.meta_path == before


@pytest.mark.parametrize(
    ("library", "precision", "says"),
    [
        ("", "float32", "was built without torch(?s:.*)scripts/setup --horovod"),
        ("mpi_lib_v2.so", "mixed_float16", "torch heeds none(?s:.*)torch.autocast"),
        ("mpi_lib_v2.so", "float32", "imported with 1 thread"),
    ],
)
def test_the_import_finds_a_framework_that_is_ready_or_says_why_not(
    tmp_path: Path, library: str, precision: str, says: str
) -> None:
    """A stand-in for Horovod, whose import tells what it found; torch is the real one."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch: not installed (scripts/setup --torch)")
    (tmp_path / "horovod/torch").mkdir(parents=True)
    (tmp_path / "horovod/__init__.py").touch()
    found = "import torch\nprint(f'imported with {torch.get_num_threads()} thread')\n"
    (tmp_path / "horovod/torch/__init__.py").write_text(found)
    if library:
        (tmp_path / "horovod/torch" / library).touch()
    code = (
        "from hpcml.training import common, horovod\n"
        f"horovod.begin(common.Expected('horovod', virtual=True), 0, 'run', {{}}, precision={precision!r})\n"
        "import horovod.torch\n"
    )
    own = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=120)
    assert re.search(says, done.stdout + done.stderr), done.stdout + done.stderr


def test_the_job_must_give_each_gpu_a_process_and_not_keras_3(tmp_path: Path) -> None:
    resources = "[resources]\ngpus_per_node = 2\ntasks_per_node = "
    assert resolved(tmp_path, f"{resources}2\n").frameworks == ("horovod",)
    with pytest.raises(HpcmlError, match=r"Horovod takes one process for each GPU(?s:.*)tasks_per_node=2"):
        resolved(tmp_path, f"{resources}1\n")
    with pytest.raises(HpcmlError, match="averages no gradients with Keras 3"):
        resolved(tmp_path, f'keras = "3"\n{resources}2\n')


# ------------------------------------------------------------------ its build

TOOLS = (
    "bash sh env dirname basename readlink sed grep tr cut cat cmp cksum sha256sum mktemp mkdir rm mv cp tail tar gzip"
)
PYTHON = """#!/bin/bash
# A Python with the packages that the test wants, whose pip builds a wheel out of nothing.
case $1 in
  -)
    case $(cat) in
      *packages_distributions*) printf '%s\\n' "python cpython-311 linux-x86_64" "torch $TORCH" "tensorflow $TENSORFLOW" ;;
      *) [[ -n ${CUDA-} ]] ;;
    esac
    ;;
  -c) if [[ $2 == *purelib* ]]; then echo "$SITE"; else echo "$2" >>"$RECORD"; fi ;;
  *)
    echo "$* | $HOROVOD_WITH_PYTORCH$HOROVOD_WITHOUT_PYTORCH $HOROVOD_GPU_OPERATIONS" >>"$RECORD"
    case "$*" in
      *"pip download"*) cp "$SOURCE" "${@: -1}/" ;;
      *"pip wheel"*)
        grep -q 'CXX_STANDARD 17' "${@: -1}/CMakeLists.txt" || exit 9
        if [[ -n ${BROKEN-} ]]; then echo "mpi_ops.cc:7:1: error: no such luck"; exit 1; fi
        mkdir -p "$SITE/../wheel"
        while [[ $1 != -w ]]; do shift; done
        mkdir -p "$2" && : >"$2/horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
        ;;
      *"pip install"*) mkdir -p "$SITE/horovod-0.28.1.dist-info" && : >"$SITE/horovod-0.28.1.dist-info/METADATA" ;;
    esac
    ;;
esac
"""


class Workshop:
    """A folder with a stub Python, the tools of a small machine, and Horovod's source as far as the patch touches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in [*TOOLS.split(), "nproc"]:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.skip(f"{tool}: not installed"))
        for tool in ("g++", "make", "cmake"):
            self.tool(tool)
        (self.bin / "patch").symlink_to(shutil.which("patch") or pytest.skip("patch: not installed"))
        (self.bin / "python").write_text(PYTHON)
        (self.bin / "python").chmod(0o755)
        self.environment = {
            "PATH": str(self.bin), "HOME": str(folder), "SITE": str(folder / "site"), "RECORD": str(folder / "record"),
            "SOURCE": str(folder / "horovod-0.28.1.tar.gz"), "TORCH": "2.13.0", "TENSORFLOW": "2.21.0",
        }  # fmt: skip
        with tarfile.open(self.environment["SOURCE"], "w:gz") as archive:
            for name, text in before_the_patch().items():
                path = folder / "source" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                archive.add(path, f"horovod-0.28.1/{name}")

    def tool(self, name: str) -> None:
        (self.bin / name).write_text("#!/bin/sh\n")
        (self.bin / name).chmod(0o755)

    def install(self, **more: str) -> subprocess.CompletedProcess[str]:
        words = [str(BUILD / "install"), str(self.bin / "python")]
        environment = {**self.environment, **more}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)

    def asked(self) -> list[str]:
        """What the stub was asked to do since the last look."""
        record = Path(self.environment["RECORD"])
        words = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return words


def before_the_patch() -> dict[str, str]:
    """The lines that the patch expects, by file."""
    files: dict[str, list[str]] = {}
    name = ""
    for line in next(BUILD.glob("*.patch")).read_text().splitlines():
        if line.startswith("--- a/"):
            name = line.removeprefix("--- a/")
            files[name] = []
        elif name and line[:1] in (" ", "-"):
            files[name].append(line[1:])
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_the_wheel_is_built_once_and_then_taken_from_the_cache(workshop: Workshop) -> None:
    first = workshop.install()
    assert first.returncode == 0 and "5 to 8 minutes" in first.stderr and "is installed" in first.stderr, first.stderr
    (built,) = [line for line in workshop.asked() if "pip wheel" in line]
    assert "--no-build-isolation" in built and built.endswith("| 1 ")
    assert (workshop.install().stderr, workshop.asked()) == ("", []), "nothing to do"

    shutil.rmtree(workshop.folder / "site")  # another environment
    assert "building" not in workshop.install().stderr
    assert not any("pip wheel" in line for line in workshop.asked())

    shutil.rmtree(workshop.folder / "site")
    shutil.rmtree(workshop.folder / ".cache")
    assert "building" in workshop.install().stderr, "the cache is gone"


@pytest.mark.parametrize("change", [{"TORCH": "2.14.0"}, {"TENSORFLOW": "none"}, {"HOROVOD_GPU_OPERATIONS": "NCCL"}])
def test_another_framework_or_option_has_a_wheel_of_its_own(workshop: Workshop, change: dict[str, str]) -> None:
    workshop.install()
    workshop.asked()
    done = workshop.install(**change)
    assert done.returncode == 0, done.stderr
    (built,) = [line for line in workshop.asked() if "pip wheel" in line]
    assert built.endswith(f"| 1 {change.get('HOROVOD_GPU_OPERATIONS', '')}")
    assert len(list((workshop.folder / ".cache/hpcml/wheels").glob("horovod-*/*.whl"))) == 2


@pytest.mark.parametrize(
    ("missing", "change", "code", "says"),
    [
        ("", {"TORCH": "none", "TENSORFLOW": "none"}, 2, "neither torch nor TensorFlow is installed"),
        ("g++", {}, 2, r"g\+\+ not found(?s:.*)apt-get install g\+\+"),
        (
            "",
            {"BROKEN": "1"},
            1,
            r"error: no such luck(?s:.*)could not be built; the whole log: \S+/\.cache/hpcml/\S+\.log",
        ),
        ("", {"CUDA": "1"}, 2, "torch here is built for GPUs(?s:.*)HOROVOD_GPU_OPERATIONS=NCCL"),
    ],
)
def test_where_it_cannot_be_built_it_says_why_and_what_to_use_instead(
    workshop: Workshop, missing: str, change: dict[str, str], code: int, says: str
) -> None:
    if missing:
        (workshop.bin / missing).unlink()
    done = workshop.install(**change)
    assert done.returncode == code
    assert re.search(says, done.stderr), done.stderr
    assert 'instead: strategy "ddp" (torch) or "multiworker" (TensorFlow)' in done.stderr
    assert not list(workshop.folder.glob(".cache/hpcml/wheels/.build.*")), "nothing half-built stays"


def test_setup_builds_it_for_the_environment_that_it_made(tmp_path: Path) -> None:
    for name in ("scripts/setup", "scripts/lib/apt.bash", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tensorflow", "torch", "horovod"):
        (tmp_path / "envs" / name).mkdir(parents=True)
        (tmp_path / "envs" / name / "requirements.txt").write_text("click==8.1.7\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$*" in *"-m venv "*) mkdir -p .venv/bin && cp python .venv/bin ;; esac\n'
    )
    (tmp_path / "envs/horovod/install").write_text('#!/bin/sh\necho "built for $1"\nexit ${FAILS:-0}\n')
    for name in ("python", "envs/horovod/install"):
        (tmp_path / name).chmod(0o755)

    def setup(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        own = {**os.environ, "PYTHON": str(tmp_path / "python"), **more}
        words = (str(tmp_path / "scripts/setup"), *words)
        return subprocess.run(words, env=own, capture_output=True, text=True, timeout=60)

    assert setup("--torch").stdout == ""
    assert setup("--horovod").stdout == "built for .venv/bin/python\n", "also where all else is up to date"
    assert setup("--horovod", FAILS="1").returncode == 1


# ------------------------------------------------------------------ the notebook and its job


def test_the_notebook_has_the_sections_and_values_of_ddps() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext: not installed (pip install 'hpcml[notebook]')")
    ours, theirs = (jupytext.read(ROOT / "notebooks" / f"simple2GPUs{name}.py").cells for name in ("Horovod", "DDP"))
    kinds = [
        [(c.cell_type, c.source.splitlines()[0][:3] == "## ", c.metadata) for c in cells] for cells in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]
    same = [
        a.source == b.source for a, b in zip(ours, theirs, strict=True) if "parameters" in a.metadata.get("tags", [])
    ]
    assert same == [True]
    written = json.loads(jupytext.writes(jupytext.read(ROOT / "notebooks/simple2GPUsHorovod.py"), fmt="ipynb"))["cells"]
    kept = json.loads((ROOT / "notebooks/simple2GPUsHorovod.ipynb").read_text())["cells"]
    parts = [[(c["cell_type"], c["source"], c["metadata"]) for c in cells] for cells in (kept, written)]
    assert parts[0] == parts[1], "after a change in the script: jupytext --to ipynb notebooks/simple2GPUsHorovod.py"


def test_the_job_asks_for_what_ddps_does() -> None:
    ours, theirs = (job.load(ROOT / "jobs" / f"mnist_{name}.toml") for name in ("horovod", "ddp"))
    assert (ours.resources, ours.params) == (theirs.resources, theirs.params)
    assert ours.params == facts.declared_parameters(ROOT / "notebooks/simple2GPUsHorovod.ipynb").defaults
    assert plan.unfair({one.name: plan.resolve(one, site.load("generic")) for one in (ours, theirs)}) == []


# ------------------------------------------------------------------ whole runs

TORCH = """
import os, hpcml

run = hpcml.begin(strategy="horovod")

import horovod.torch as hvd
import torch

hvd.init()
rank, world = hvd.rank(), hvd.size()
torch.manual_seed(5)
x, y = torch.randn(64, 4), torch.randn(64, 1)
data = torch.utils.data.TensorDataset(x, y)
sampler = torch.utils.data.DistributedSampler(data, num_replicas=world, rank=rank, shuffle=False)
loader = torch.utils.data.DataLoader(data, batch_size=8 // world, sampler=sampler)
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
{wrap}
steps = 0
for epoch in run.epochs({epochs}, model, global_batch=8):
    for xs, ys in run.steps(loader):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(xs), ys).backward()
        optimizer.step()
        steps += 1
        {each}
total = sum(float(p.detach().abs().sum()) for p in model.parameters())
print("rank", rank, "steps", steps, "threads", torch.get_num_threads(), "total", round(total, 4))
hvd.shutdown()
"""
WRAP = "optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())"
KERAS = """
import hpcml

run = hpcml.begin(strategy="horovod")
{before}
import horovod.tensorflow.keras as hvd
import keras
import tensorflow as tf

hvd.init()
print("keras", keras.__version__, keras.Model is tf.keras.Model)
tf.keras.utils.set_random_seed(11 + {own_seed} * hvd.rank())
model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(1)])
tf.keras.utils.set_random_seed(5)
x, y = tf.random.normal((64, 4)), tf.random.normal((64, 1))
data = tf.data.Dataset.from_tensor_slices((x, y)).shard(hvd.size(), hvd.rank()).batch(8 // hvd.size())
optimizer = tf.keras.optimizers.AdamW(0.01)
{wrap}
model.compile(optimizer=optimizer, loss="mse")
callbacks = [{first}*run.callbacks(global_batch=8)]
history = model.fit(data, epochs=2, verbose=0, callbacks=callbacks).history
total = sum(abs(w).sum() for w in model.get_weights())
print("rank", hvd.rank(), "speeds", len(history["samples_per_s"]), "total", round(float(total), 4))
hvd.shutdown()
"""
KERAS_WRAP = "optimizer = hvd.DistributedOptimizer(optimizer)"
BROADCAST = "hvd.callbacks.BroadcastGlobalVariablesCallback(0), "
JOB = (
    'script = "work.py"\nstrategy = "horovod"\n[resources]\ngpus_per_node = 2\ntasks_per_node = 2\ncpus_per_task = 1\n'
)
HERE = ["-m", "hpcml", "run", "job.toml"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def with_torch(wrap: str = WRAP, epochs: int = 2, each: str = "pass") -> str:
    return TORCH.format(wrap=wrap, epochs=epochs, each=each)


def with_keras(before: str = "", wrap: str = KERAS_WRAP, first: str = BROADCAST, own_seed: int = 1) -> str:
    return KERAS.format(before=before, wrap=wrap, first=first, own_seed=own_seed)


def start(folder: Path, words: list[str], body: str = "") -> tuple[subprocess.CompletedProcess[str], rundir.RunDir]:
    if body:
        (folder / "work.py").write_text(body)
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=300
    )
    runs = [path for path in (folder / "runs").glob("*") if path.is_dir()]
    assert len(runs) == 1, done.stdout + done.stderr
    return done, rundir.RunDir(folder / "runs", runs[0].name)


def logs(run: rundir.RunDir) -> str:
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(run.logs.glob("*")))


def said(run: rundir.RunDir, rank: int, word: str) -> str:
    """The word that a rank printed after another."""
    return run.log(rank).read_text().partition(f" {word} ")[2].split()[0]


@needs_horovod
def test_the_notebooks_script_trains_on_two_ranks_that_agree(tmp_path: Path) -> None:
    for name in ("jobs/mnist.toml", "jobs/mnist_horovod.toml", "notebooks/simple2GPUsHorovod.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pyproject.toml").touch()
    text = (tmp_path / "jobs/mnist_horovod.toml").read_text().replace("notebook =", "script =").replace(".ipynb", ".py")
    (tmp_path / "jobs/mnist_horovod.toml").write_text(text)
    done, run = start(tmp_path, ["-m", "hpcml", "run", "jobs/mnist_horovod.toml", "-p", "epochs=2"])
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 2)
    values = {k: v for r in journal.read(run.events) if r["kind"] == "metric" for k, v in r["values"].items()}
    assert values["val_accuracy"] > 0.85
    shown = [line for rank in (0, 1) for line in run.log(rank).read_text().splitlines() if line.startswith("accuracy")]
    assert len({line.split(",")[0] for line in shown}) == 1 and len(shown) == 2


@needs_horovod
def test_two_ranks_learn_what_one_process_would_of_the_same_batches(folder: Path) -> None:
    done, run = start(folder, HERE, with_torch())
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    assert [(said(run, rank, "steps"), said(run, rank, "threads")) for rank in (0, 1)] == [("16", "1")] * 2
    two = float(said(run, 0, "total"))
    shutil.rmtree(folder / "runs")
    done, run = start(folder, ["work.py"])  # by hand, with no worker and no other rank
    assert done.returncode == 0, done.stdout + done.stderr
    assert rundir.read_json(run.status)["replicas_in_sync"] == 1
    assert float(done.stdout.partition(" total ")[2].split()[0]) == pytest.approx(two, abs=2e-3)


@needs_horovod
def test_gradients_that_are_not_averaged_end_a_torch_training(folder: Path) -> None:
    done, run = start(folder, HERE, with_torch(wrap=""))
    marker = rundir.read_json(run.status)
    assert (done.returncode, marker["state"]) == (1, "FAILED")
    assert "the weights of rank 1 differ from rank 0's after step 1: the gradients are not averaged" in logs(run)
    assert "hvd.DistributedOptimizer" in logs(run)
    assert marker["replicas_in_sync"] == 1


@needs_horovod
def test_a_rank_that_dies_ends_the_job_with_its_reason(folder: Path) -> None:
    done, run = start(
        folder, HERE, with_torch(epochs=10**6, each="if steps == 20 and rank == 1: os.kill(os.getpid(), 9)")
    )
    marker = rundir.read_json(run.status)
    assert (done.returncode != 0, marker["state"]) == (True, "FAILED")
    assert "killed by SIGKILL" in marker["reason"], logs(run)


@needs_horovod
def test_a_stop_file_ends_a_job_on_the_same_step_of_all_ranks(folder: Path) -> None:
    each = (
        "if steps == 20 and rank == 1: hpcml.starting.rundir.write_json("
        "run.dir.stop, {'signal': 'SIGUSR2', 'time': 0, 'restart': 0})"
    )
    done, run = start(folder, HERE, with_torch(epochs=10**6, each=each))
    steps = [int(said(run, rank, "steps")) for rank in (0, 1)]
    assert steps[0] == steps[1] >= 20, done.stdout + done.stderr + logs(run)


@needs_horovod
def test_keras_ranks_that_start_apart_train_together(folder: Path) -> None:
    done, run = start(folder, HERE, with_keras())
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 2)
    for rank in (0, 1):
        text = run.log(rank).read_text()
        assert f"rank {rank} speeds 2" in text
        assert re.search(r"^keras 2\.\S+ True$", text, re.MULTILINE), "import keras is tf-keras"
    (replicas,) = [r for r in journal.read(run.events) if r["kind"] == "replicas" and r["rank"] == 1]
    assert (replicas["in_sync"], replicas["expected"], replicas["virtual"]) == (2, 2, True)


@needs_horovod
def test_two_keras_ranks_learn_what_one_process_would_of_the_same_batches(folder: Path) -> None:
    done, run = start(folder, HERE, with_keras(own_seed=0))
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    two = float(said(run, 0, "total"))
    shutil.rmtree(folder / "runs")
    done, _ = start(folder, ["work.py"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.partition(" total ")[2].split()[0]) == pytest.approx(two, abs=2e-3)


@needs_horovod
@pytest.mark.parametrize(
    ("change", "step"),
    [({"wrap": "", "first": "", "own_seed": 0}, 1), ({"wrap": ""}, 8)],
    ids=["at-once", "behind-a-broadcast"],
)
def test_gradients_that_are_not_averaged_end_a_keras_training(folder: Path, change: dict[str, Any], step: int) -> None:
    done, run = start(folder, HERE, with_keras(**change))
    assert (done.returncode, rundir.read_json(run.status)["state"]) == (1, "FAILED")
    assert f"the weights of rank 1 differ from rank 0's after step {step}: the gradients are not averaged" in logs(run)


@needs_horovod
def test_keras_3_never_gets_to_train(folder: Path) -> None:
    done, _ = start(folder, ["work.py"], with_keras(before="import keras"))
    assert done.returncode == 1
    assert re.search(r"Keras 3\.\S+ was imported before Horovod(?s:.*)averages no gradients", done.stderr), done.stderr


@needs_horovod
def test_horovod_that_was_not_started_is_told(folder: Path) -> None:
    body = with_torch().replace("hvd.init()", "").replace("hvd.rank(), hvd.size()", "run.topology.rank, 2")
    done, run = start(folder, HERE, body.replace(WRAP, ""))
    assert done.returncode == 1
    assert "each of the 2 tasks trains the whole job by itself: Horovod was not started" in logs(run)
