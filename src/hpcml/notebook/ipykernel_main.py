"""ipykernel that drops no output, as the engine starts it: ``python -P -m hpcml.notebook.ipykernel_main -f FILE``.

At ZeroMQ's default a kernel keeps 1,000 messages for a reader that is behind, and drops what comes then: on a node whose
cores are all at work, the last thousand lines of a cell that printed three thousand were lost.
"""

from typing import Any

import zmq
from ipykernel.kernelapp import IPKernelApp

from ..tracking import heartbeat


class KernelApp(IPKernelApp):  # type: ignore[misc]
    """The kernel's process."""

    def init_iopub(self, context: Any) -> None:
        """Make the socket of the outputs, without a limit to what waits in it."""
        context.setsockopt(zmq.SNDHWM, 0)  # of sockets made from here on; zmq_setsockopt(3): 0 means no limit
        super().init_iopub(context)


if __name__ == "__main__":
    heartbeat.begin()  # before a cell does: one that never comes to begin() can be looked into too
    KernelApp.launch_instance()
