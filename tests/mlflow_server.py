"""A real MLflow server for tests and benchmarks, and a door before it that can be slammed. On the loopback only."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

READY_S = 120
DROP = "drop the answer"
HANG = "hang"


class Server:
    """A server with one worker over an SQLite file; it can be killed, stopped and started again at its port.

    Args:
        folder: for its database, artifacts and log.
        words: more of its command line.
        environment: of the process, by default this one's.
    """

    def __init__(self, folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.words = folder, words
        self.environment = dict(os.environ if environment is None else environment)
        self.database = folder / "mlflow.db"
        self.store = f"sqlite:///{self.database}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it ended, or takes over two minutes; with its log.
        """
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store, *self.words]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.child = subprocess.Popen(
                command, cwd=self.folder, env=self.environment | own, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + READY_S
        while not self.answers():
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server did not start:\n{(self.folder / 'log').read_text()[-4000:]}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def signal(self, number: int) -> None:
        """Send a signal to it and its worker: they are a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        self.child.wait(30)


@contextlib.contextmanager
def serving(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Yield a server meanwhile."""
    server = Server(folder, *words, environment=environment)
    try:
        yield server
    finally:
        server.kill()


class Door(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, as a gateway does, and fails where ``verdict`` says so.

    Attributes:
        verdict: from a request's path and how many there were of this path, to None, the status to answer with, ``DROP``
            after the server took it, or ``HANG`` until ``opened``.
        seen: path and Authorization header of each request.
        largest: size of the largest body, in bytes.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.upstream = urlsplit(upstream).netloc
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str | None]] = []
        self.largest = 0
        self.verdict: Callable[[str, int], str | int | None] = lambda path, count: None
        self.opened = threading.Event()


class _Pass(http.server.BaseHTTPRequestHandler):
    server: Door

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.largest = max(self.server.largest, len(body))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        verdict = self.server.verdict(self.path, sum(path == self.path for path, _ in self.server.seen))
        if verdict == HANG:
            self.server.opened.wait(60)
            self.close_connection = True
            return
        if verdict and verdict != DROP:
            self.send_error(int(verdict), "computer says no")
            return
        onward = http.client.HTTPConnection(self.server.upstream)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        onward.request(self.command, self.path, body, headers)
        answer = onward.getresponse()
        content = answer.read()
        onward.close()
        if verdict == DROP:
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def door_of(server: Server) -> Iterator[Door]:
    """Yield an open door before a server meanwhile."""
    with Door(server.uri) as door:
        thread = threading.Thread(target=door.serve_forever)
        thread.start()
        try:
            yield door
        finally:
            door.opened.set()
            door.shutdown()
            thread.join()
