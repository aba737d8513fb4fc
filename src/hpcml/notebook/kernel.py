"""A kernel on this node: this interpreter, unix sockets in a private folder, no history file."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from traitlets import Unicode

from ..errors import HpcmlError

NATIVE = "python3"
# unix(7): sun_path holds 108 bytes, the final NUL among them; jupyter_client appends "-1" to "-5" for the channels.
_SUN_PATH = 108
# A kernel that was asked to leave gets half of this before SIGTERM, all of it before SIGKILL: exit handlers of a
# training, such as a last upload, take seconds.
SHUTDOWN_S = 20.0
_LAST_WORDS = 4096


class Specs(KernelSpecManager):  # type: ignore[misc]
    """The installed kernels, except that Python is always this interpreter.

    A ``python3`` in the home directory may belong to another environment, and a notebook saved elsewhere may name a
    kernel that isn't here, or one that would queue a job of its own.
    """

    language = Unicode("python")

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the kernel to run, whatever the notebook calls it."""
        if kernel_name.lower() in ("python", NATIVE):
            return self._native()
        try:
            spec = super().get_kernel_spec(kernel_name)
        except NoSuchKernel:
            spec = None
        provisioner = (spec.metadata if spec else {}).get("kernel_provisioner", {}).get("provisioner_name")
        if spec and provisioner in (None, "local-provisioner"):
            return spec
        if self.language.lower() in ("python", "ipython", ""):
            return self._native()
        raise HpcmlError(
            f"the kernel {kernel_name!r} ({self.language}) is not installed", origin="metadata.kernelspec",
            allowed=", ".join(sorted(self.find_kernel_specs())), fix="install it into the job's environment",
        )  # fmt: skip

    def _native(self) -> KernelSpec:
        if importlib.util.find_spec("ipykernel") is None:
            raise HpcmlError(
                f"{sys.executable} has no ipykernel, so it can't run notebooks", origin="the job's environment",
                fix=f"install it: {sys.executable} -m pip install 'hpcml[notebook]'",
            )  # fmt: skip
        argv = [sys.executable, "-P", "-m", f"{__package__}.ipykernel_main", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python")


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only the user can enter, on the node, short enough for sockets; remove it afterwards."""
    longest = len(os.fsencode(tempfile.gettempdir())) + len("/hpcml-12345678/k-5\0")
    folder = Path(tempfile.mkdtemp(prefix="hpcml-", dir=None if longest <= _SUN_PATH else "/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def manager(name: str, language: str, folder: Path, log: Any) -> AsyncKernelManager:
    """Return a manager for a kernel whose sockets and connection file lie in ``folder``."""
    return AsyncKernelManager(
        kernel_name=name,
        kernel_spec_manager=Specs(language=language),
        transport="ipc",
        ip=str(folder / "k"),
        connection_file=str(folder / "kernel.json"),
        shutdown_wait_time=SHUTDOWN_S,
        log=log,
    )


async def start(kernel: AsyncKernelManager, cwd: Path) -> None:
    """Start the kernel's process.

    ipykernel sends what libraries write to the process's own stdout and stderr as messages, and writes it there too:
    that copy goes to a file, for ``last_words``. Other kernels' own output joins this process's stdout.

    Raises:
        HpcmlError: no such kernel, or its program can't be started.
    """
    # SQLite stalls on network file systems, and ranks would share one file.
    quiet = ["--HistoryManager.enabled=False", "--HistoryManager.hist_file=:memory:"]
    ours = _is_ipykernel(kernel)
    try:
        with _copy(kernel).open("wb") as copy:
            await kernel.start_kernel(
                extra_arguments=quiet if ours else [], cwd=str(cwd),
                stdout=copy if ours else None, stderr=subprocess.STDOUT,
            )  # fmt: skip
    except OSError as error:
        raise HpcmlError(
            f"the kernel {kernel.kernel_name!r} can't be started: {error}", origin="metadata.kernelspec",
            fix="check that its program and the working directory exist",
        ) from None  # fmt: skip


def last_words(kernel: AsyncKernelManager) -> str:
    """Return the end of what the kernel's process wrote past Jupyter's channels."""
    with _copy(kernel).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS))
        return file.read().decode(errors="replace").strip()


async def stop(kernel: AsyncKernelManager, client: Any, *, now: bool) -> None:
    """End the kernel and close its channels; one that is dead already is fine."""
    if kernel.has_kernel and await kernel.is_alive():
        if now or client is None:
            await kernel.shutdown_kernel(now=True)
        elif _is_ipykernel(kernel):
            # On the shell channel: asked on the control channel, as shutdown_kernel does, ipykernel's control thread may
            # wait 10 s for the output thread that its main thread has just ended; one run in fifteen on a busy node.
            client.shell_channel.send(client.session.msg("shutdown_request", {"restart": False}))
            await kernel.finish_shutdown(pollinterval=0.05)
        else:
            await kernel.shutdown_kernel()
    if client is not None:
        client.stop_channels()
    await kernel.cleanup_resources()


def _is_ipykernel(kernel: AsyncKernelManager) -> bool:
    return any("ipykernel" in word for word in kernel.kernel_spec.argv)


def _copy(kernel: AsyncKernelManager) -> Path:
    return Path(kernel.connection_file).with_suffix(".log")


async def obituary(kernel: AsyncKernelManager) -> str:
    """Say how a kernel's process ended."""
    code = await kernel.provisioner.poll() if kernel.provisioner else None
    if code is None:
        return "it doesn't answer"
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (", most often for want of memory" if name == "SIGKILL" else "")
