"""Horovod, thinly: its ranks find one another, its import finds a framework that is ready, and the ranks are compared.

``hvd.init()``, the broadcasts and ``DistributedOptimizer`` stay in the notebook as plain Horovod. Its ranks talk over
Gloo (NCCL on GPUs, where it is built for them) and are started by whatever starts hpcml's: no ssh, no mpirun.

With torch the ranks are compared by ``run.epochs`` and ``run.steps``, with Keras by ``run.callbacks``. Keras is tf-keras
here: with Keras 3 Horovod 0.28.1's ``DistributedOptimizer`` averages no gradients, without a word. Horovod and the
frameworks are imported inside the functions.
"""

import http.client
import importlib
import importlib.util
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from . import ddp
from .common import Expected

if TYPE_CHECKING:
    import torch

STRATEGY = "horovod"
BUILD = "scripts/setup --horovod, which builds it for the torch and TensorFlow of the environment (minutes; needs g++)"
INSTEAD = 'strategy "ddp" (torch) or "multiworker" (TensorFlow) does the same without it'
# Ranks import from a shared file system at different speeds, by minutes. Where rank 0 has died, srun ends those that wait.
START_S = 300.0
_ORIGIN = f'strategy "{STRATEGY}"'
NOT_AVERAGED = "the DistributedOptimizer of Horovod 0.28.1 averages no gradients with Keras 3, and says nothing"


def begin(expected: Expected, rank: int, run_id: str, environment: Mapping[str, str], *, precision: str) -> None:
    """Make ready for ``import horovod.torch`` or ``import horovod.tensorflow``, and for ``hvd.init()`` after it.

    Rank 0 serves Horovod's rendezvous from a thread until its process ends; the others wait until it does. The import
    then sets threads, devices and the Keras flavour of its framework first.

    Args:
        run_id: tells this run's rendezvous from another's at the same address.
        environment: of this process, as the bootstrap has set it: ``HOROVOD_GLOO_RENDEZVOUS_ADDR`` and ``_PORT``, and
            ``HPCML_PEER``, an address on another node, where there are several.
        precision: of Keras.

    Raises:
        HpcmlError: Horovod is not installed, the address is taken, or rank 0 doesn't answer.
    """
    need()
    sys.meta_path.insert(0, _Imports(expected, precision))
    if expected.world == 1:
        return
    host, port = environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(environment["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    peer = environment.get("HPCML_PEER", "")
    if rank == 0:
        # On several nodes at all addresses: this one may know its own name by another than the others do.
        serve("" if peer else host, port, run_id)
    else:
        wait_for_rank_0(host, port, run_id)
    if peer and not environment.get("HOROVOD_GLOO_IFACE") and (name := interface_towards(peer)):
        os.environ["HOROVOD_GLOO_IFACE"] = name


def need() -> None:
    """Raise where Horovod is not installed."""
    if importlib.util.find_spec("horovod") is None:
        what = f"{_ORIGIN} needs Horovod, which {sys.executable} lacks"
        raise HpcmlError(what, fix=f"{BUILD}; {INSTEAD}")


def serve(host: str, port: int, run_id: str) -> None:
    """Serve Horovod's rendezvous, a small key-value store over HTTP, from a thread until the process ends.

    Args:
        host: the address to listen on; empty for all.

    Raises:
        HpcmlError: the address can't be had.
    """
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    class Server(RendezvousHTTPServer):  # type: ignore[misc]
        daemon_threads = True
        request_queue_size = 128  # all ranks come at once; of those that find no room each waits a second

        def server_bind(self) -> None:
            socketserver.TCPServer.server_bind(
                self
            )  # HTTPServer's looks up the host's name, which takes as long as it likes

    try:
        server = Server((host, port), RendezvousHandler, 0)
    except OSError as error:
        fix = "HPCML_PORT=… for other ports, or start it again"
        what = f"rank 0 can't listen on port {port}, where the ranks of Horovod meet: {error.strerror}"
        raise HpcmlError(what, origin=_ORIGIN, fix=fix) from None
    # Without init(): the scopes that it lists are cleared all at once, the others key by key as each rank has done.
    server.cache["hpcml"] = {"run": run_id.encode()}
    threading.Thread(target=server.serve_forever, name="horovod-rendezvous", daemon=True).start()


def wait_for_rank_0(host: str, port: int, run_id: str, limit_s: float = START_S) -> None:
    """Return when rank 0 serves this run's rendezvous: Horovod's own client gives up after 1.5 s.

    Raises:
        HpcmlError: nobody does within the limit, or another run does.
    """
    deadline = time.monotonic() + limit_s
    told: str | None = None
    while time.monotonic() < deadline:
        told = _ask(host, port) or told
        if told == run_id:
            return
        time.sleep(0.05)
    what = f"rank 0 of this run did not answer at {host}:{port} within {limit_s:.0f} s"
    if told is not None:
        what += f"; run {told} did"
    raise HpcmlError(what, origin=_ORIGIN, fix="look at rank 0's log; or HPCML_PORT=… for other ports")


def _ask(host: str, port: int) -> str | None:
    """Return the run whose rendezvous is served at an address, None where none is. Proxies are passed by."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/hpcml/run")
        answer = connection.getresponse()
        return answer.read(300).decode(errors="replace") if answer.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def interface_towards(host: str) -> str | None:
    """Return the network interface that leads to a host, where Gloo would look up this host's name; None if unknown."""
    import psutil  # Horovod depends on it

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing; any port will do
            mine = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == mine for one in addresses)), None)


class _Imports:
    """Comes before Python's own finders: prepares a framework when Horovod's side for it is about to be imported."""

    def __init__(self, expected: Expected, precision: str) -> None:
        self._to_do: dict[str, Callable[[Expected, str], None]] = {
            "horovod.torch": _prepare_torch,
            "horovod.tensorflow": _prepare_tensorflow,
            "horovod.keras": _prepare_tensorflow,
        }
        self._expected, self._precision = expected, precision

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing; the next finder does."""
        prepare = self._to_do.get(name)
        if prepare is not None:
            prepare(self._expected, self._precision)
            self._to_do = {key: todo for key, todo in self._to_do.items() if todo is not prepare}


def _prepare_torch(expected: Expected, precision: str) -> None:
    _built_for("torch", "mpi_lib_v2")
    if precision != "float32":
        fix = "torch.autocast(run.device.type, torch.bfloat16) around the model's call"
        raise HpcmlError(f"precision = {precision!r} is a policy of Keras, and torch heeds none", fix=fix)
    from . import torch as training

    training.configure(expected, os.environ)


def _prepare_tensorflow(expected: Expected, precision: str) -> None:
    _built_for("tensorflow", "mpi_lib")
    refuse_keras_3()
    from . import tensorflow as training

    training.configure(expected, precision=precision)
    tf_keras = importlib.import_module("tf_keras")
    # Horovod imports keras, and so may the work: both are to get what tf.keras is.
    sys.modules["keras"], sys.modules["keras.backend"] = tf_keras, tf_keras.backend


def refuse_keras_3() -> None:
    """Raise where the work would train with Keras 3, or tf-keras is not installed."""
    fix = "leave out keras = '3' and TF_USE_LEGACY_KERAS, and use tf.keras, which is tf-keras then"
    asked = os.environ.get("TF_USE_LEGACY_KERAS", "")
    if asked.lower() not in ("1", "true"):
        raise HpcmlError(NOT_AVERAGED, origin=f"TF_USE_LEGACY_KERAS={asked}", fix=fix)
    imported = sys.modules.get("keras")
    if imported is not None and not imported.__name__.startswith("tf_keras"):
        version = getattr(imported, "__version__", "")
        raise HpcmlError(f"Keras {version} was imported before Horovod; {NOT_AVERAGED}", origin="import keras", fix=fix)
    if importlib.util.find_spec("tf_keras") is None:
        raise HpcmlError(
            "Horovod with TensorFlow needs tf-keras beside it", fix="scripts/setup, or pip install tf-keras"
        )


def _built_for(framework: str, library: str) -> None:
    """Raise where a framework is missing, or Horovod was built without it; its own import then only prints."""
    if importlib.util.find_spec(framework) is None:
        fix = f"scripts/setup --horovod, which brings it; {INSTEAD}"
        raise HpcmlError(f"horovod.{framework} needs {framework}, which {sys.executable} lacks", fix=fix)
    spec = importlib.util.find_spec("horovod")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not any(list((place / framework).glob(f"{library}*.so")) for place in places):
        raise HpcmlError(f"the Horovod of {sys.executable} was built without {framework}", fix=f"{BUILD}; {INSTEAD}")


# ------------------------------------------------------------------ are the ranks one training?


def check_started(expected: Expected, hvd: Any) -> None:
    """Raise where Horovod does not join all tasks of the job, or can't use the GPU that this one was given.

    Args:
        hvd: ``horovod.torch`` or ``horovod.tensorflow``; None where the work imported neither.
    """
    world = hvd.size() if hvd is not None and hvd.is_initialized() else 0
    fix = "hvd.init() after hpcml.begin(); start the ranks with hpcml run, sbatch or srun, not with horovodrun"
    if world == 0:
        alone = f"each of the {expected.world} tasks trains the whole job by itself: " if expected.world > 1 else ""
        raise HpcmlError(f"{alone}Horovod was not started", origin=_ORIGIN, fix=fix)
    if world != expected.world:
        raise HpcmlError(f"Horovod joins {world} ranks, the job has {expected.world}", origin=_ORIGIN, fix=fix)
    if (
        expected.gpus_per_task
        and not expected.virtual
        and not (hvd.nccl_built() or hvd.cuda_built() or hvd.rocm_built())
    ):
        fix = f"HOROVOD_GPU_OPERATIONS=NCCL scripts/setup --horovod, where CUDA's compiler is; {INSTEAD}"
        raise HpcmlError("this task was given a GPU, and this Horovod is built for CPUs only", origin=_ORIGIN, fix=fix)


def _check_torch(expected: Expected, model: "torch.nn.Module") -> None:
    check_started(expected, sys.modules.get("horovod.torch"))
    places = {parameter.device.type for parameter in model.parameters()}
    if not expected.virtual and expected.gpus_per_task and places != {"cuda"}:
        fix = "model.to(run.device) before the optimizer is made"
        raise HpcmlError(f"the model is on {', '.join(sorted(places))}, this task was given a GPU", fix=fix)


def gather(values: Sequence[int]) -> list[list[int]]:
    """Return the numbers of every rank, by rank, through Horovod's torch side; only this process's before ``hvd.init()``."""
    hvd = sys.modules.get("horovod.torch")
    if hvd is None or not hvd.is_initialized():
        return [list(values)]
    import torch

    # A name: those that Horovod makes up count a rank's own calls, and would not meet where one has made more.
    told: list[list[int]] = hvd.allgather(torch.tensor([list(values)], dtype=torch.int64), name="hpcml").tolist()
    return told


FIX_TORCH = (
    "optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters()), call step() of that one "
    "alone, and hvd.broadcast_parameters(model.state_dict(), root_rank=0) before the first step"
)
FIX_KERAS = (
    "model.compile(optimizer=hvd.DistributedOptimizer(optimizer)), the same seed on all ranks or "
    "hvd.callbacks.BroadcastGlobalVariablesCallback(0), and tf.keras as it is after hpcml.begin()"
)
RANKS = ddp.Ranks(STRATEGY, gather, _check_torch, FIX_TORCH)
