"""One notebook in one kernel: its cells in order, their output as it arrives, signals, and how it ended."""

import asyncio
import contextlib
import logging
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_output

from ..errors import JobFailed, Problem, Stopped
from ..tracking.journal import Journal
from . import kernel as kernels
from .live import Log, Output, joined

# After an interrupt a cell has this long to end; Slurm kills 30 s (KillWait) after it asked.
GRACE_S = 5.0
# A training that looks for the stop file by itself has this long to come to a step on which all ranks agree, and to save.
HEED_S = 12.0
# Outputs still under way when a cell's reply is here: a flood of text takes a while to arrive.
_OUTPUT_TIMEOUT_S = 60
# Messages that may wait for us: at ZeroMQ's default of 1,000 a cell that prints 30,000 lines lost a third of them.
_QUEUE = 1_000_000
# Streams of one cell are joined piece by piece up to this length, so that joining stays linear.
_JOIN_LIMIT = 1 << 16
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)


class Terminated(SystemExit):
    """SIGTERM ended the notebook: exit code 143, as a shell reports it."""

    def __init__(self, text: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.text = text


@dataclass(frozen=True)
class Cell:
    """A code cell's place among the code cells that run, counted from 1, and its title."""

    number: int
    total: int
    title: str

    def __str__(self) -> str:
        return f"cell {self.number} of {self.total}" + (f" ({self.title})" if self.title else "")


@dataclass
class Session:
    """One execution: what the caller hands in, and what it may look at afterwards."""

    notebook: str
    output: Output | None = None
    cwd: Path = field(default_factory=Path.cwd)
    journal: Journal | None = None
    cells: dict[int, Cell] = field(default_factory=dict)
    current: Cell | None = None
    heeds: Callable[[], bool] = lambda: False


def number_cells(nb: Any) -> dict[int, Cell]:
    """Return the code cells that will run, by their index: titled by the heading just above, else by their first line."""
    found: list[tuple[int, str]] = []
    heading = ""
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            above = _HEADING.findall(cell.source)
            heading = above[-1] if above else heading
        elif cell.cell_type == "code" and cell.source.strip() and "skip-execution" not in cell.metadata.get("tags", []):
            found.append((index, _short(heading or cell.source.strip().splitlines()[0].lstrip("# "))))
            heading = ""
    return {index: Cell(number, len(found), title) for number, (index, title) in enumerate(found, 1)}


class _Client(NotebookClient):  # type: ignore[misc]
    """nbclient that shows output as it arrives and joins the pieces of a stream."""

    def __init__(self, nb: Any, session: Session, files: dict[str, Any], **options: Any) -> None:
        super().__init__(nb, iopub_timeout=_OUTPUT_TIMEOUT_S, **options)
        self._output, self._log, self._files = session.output, Log(), files
        self.say = self._log.say

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        out = super().process_message(msg, cell, cell_index)
        if self._output:
            self._output.changed = True
        if out is None:
            return None
        if out.output_type == "stream":
            self._log.stream(out.name, out.text)
            if self._files.get(out.name):
                self._files[out.name].write(out.text)
        else:
            text = "\n".join(out.traceback) if out.output_type == "error" else out.data.get("text/plain")
            if text:
                self._log.say(text)
        return out

    def output(self, outs: list[Any], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
        """Join a stream's pieces; nbclient would keep each apart and spend half of its time on validating it."""
        redirected = self.output_hook_stack[msg["parent_header"].get("msg_id")] or self.clear_before_next_output
        if msg["msg_type"] != "stream" or redirected:
            return super().output(outs, msg, display_id, cell_index)
        name, text = msg["content"]["name"], msg["content"]["text"]
        last = outs[-1] if outs else None
        if last and last.output_type == "stream" and last.name == name and len(last.text) < _JOIN_LIMIT:
            last.text = joined(last.text, text)
        else:
            outs.append(NotebookNode(output_type="stream", name=name, text=joined("", text)))
        return NotebookNode(output_type="stream", name=name, text=text)


class Execution:
    """One notebook in one kernel, from its start to its end."""

    def __init__(
        self, nb: Any, marks: Any, kernel_name: str, language: str, session: Session,
        start_timeout: int, execution_timeout: int | None, files: dict[str, Any],
    ) -> None:  # fmt: skip
        self.nb, self.marks, self.session, self.start_timeout = nb, marks, session, start_timeout
        self.kernel_name, self.language = kernel_name, language
        self.options: dict[str, Any] = {"timeout": execution_timeout, "files": files}
        self.step: asyncio.Task[Any] | None = None
        self.stopped_by: signal.Signals | None = None
        self.unresponsive = self.saved = False

    async def run(self) -> None:
        log = logging.getLogger("hpcml.kernel")
        log.addHandler(logging.NullHandler())
        log.propagate = False  # what it has to say is said in hpcml's own words
        with kernels.private_folder() as folder:
            self.kernel = kernels.manager(self.kernel_name, self.language, folder, log)
            self.client = _Client(self.nb, self.session, km=self.kernel, log=log, **self.options)
            saving = asyncio.create_task(self.session.output.keep()) if self.session.output else None
            try:
                with _signals(self._on_signal):
                    await self._start()
                    await self._cells()
            finally:
                await kernels.stop(self.kernel, self.client.kc, now=self.unresponsive)
                if saving:
                    saving.cancel()
        if self.stopped_by and not self.saved:
            raise self._stopped(self.stopped_by)

    async def _start(self) -> None:
        await kernels.start(self.kernel, self.session.cwd)
        client = self.client.kc = self.kernel.client()
        client.allow_stdin = False
        client.context.setsockopt(zmq.RCVHWM, _QUEUE)
        client.start_channels()
        try:
            await self._while_not_stopped(client.wait_for_ready(timeout=self.start_timeout))
            reply = await self._while_not_stopped(self.client.async_wait_for_reply(client.kernel_info()))
        except (RuntimeError, DeadKernelError) as error:
            if self.stopped_by:
                return
            self.unresponsive = True
            reason = await kernels.obituary(self.kernel)
            self.client.say(f"the kernel did not start\n{kernels.last_words(self.kernel)}".strip())
            raise JobFailed(
                f"the kernel did not start\n  {type(error).__name__}: {error}; {reason}", origin=self.session.notebook,
                fix=f"what it wrote is in the log above; try {self.kernel.kernel_spec.argv[0]} -m ipykernel --version",
            ) from None  # fmt: skip
        if reply is not None:
            self.nb.metadata["language_info"] = reply["content"]["language_info"]

    async def _cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            if self.stopped_by:
                return
            if index in self.session.cells:
                self._announce(self.session.cells[index])
            self.marks.cell_start(cell, index)
            try:
                await self._while_not_stopped(self.client.async_execute_cell(cell, index))
            except (CellExecutionError, DeadKernelError, CellTimeoutError) as error:
                self.saved = getattr(error, "ename", "") == Stopped.__name__
                if not isinstance(error, CellExecutionError):
                    cell.outputs.append(await self._ended(error))
                self.marks.cell_exception(cell, cell_index=index)
                return
            finally:
                self.marks.cell_complete(cell, cell_index=index)
        self.client.set_widgets_metadata()
        if not self.stopped_by:
            total = len(self.session.cells)
            self._progress(total, total, "")

    def _announce(self, cell: Cell) -> None:
        self.session.current = cell
        self.client.say(f"[cell {cell.number}/{cell.total}] {cell.title}")
        self._progress(cell.number - 1, cell.total, cell.title)

    def _progress(self, done: int, total: int, text: str) -> None:
        if self.session.journal:
            self.session.journal.write("progress", done=done, total=total, unit="cell", text=text)

    async def _ended(self, error: Exception) -> Any:
        """Return an output that tells why a cell has no other end; papermill puts its marker where it finds one."""
        if self.stopped_by:
            text = f"the cell did not end within {GRACE_S:.0f} s of {self.stopped_by.name}"
            return new_output("error", ename="Interrupted", evalue=text, traceback=[text])
        self.unresponsive = True
        text = str(error) if isinstance(error, CellTimeoutError) else await kernels.obituary(self.kernel)
        text = f"the kernel died: {text}" if isinstance(error, DeadKernelError) else text
        self.client.say(f"{text}\n{kernels.last_words(self.kernel)}".strip())
        return new_output("error", ename=type(error).__name__, evalue=text.splitlines()[0], traceback=[text])

    async def _while_not_stopped(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self.stopped_by:
            work.close()
            return None
        self.step = asyncio.ensure_future(work)
        try:
            return await self.step
        except asyncio.CancelledError:
            if self.stopped_by is None:
                raise
            return None

    def _on_signal(self, number: signal.Signals) -> None:
        """The first signal interrupts the cell and gives it time; the second, or one before any cell, ends it."""
        first, self.stopped_by = self.stopped_by is None, self.stopped_by or number
        if first and self.session.current:
            self._interrupting = asyncio.create_task(self._interrupt())
        else:
            self._give_up()

    async def _interrupt(self) -> None:
        if self.step and self.session.heeds():
            await asyncio.wait([self.step], timeout=HEED_S)
            if self.step.done():
                return
        with contextlib.suppress(RuntimeError):  # the kernel may have had the signal too
            await self.kernel.interrupt_kernel()
        await asyncio.sleep(GRACE_S)
        self._give_up()

    def _give_up(self) -> None:
        self.unresponsive = True
        if self.step:
            self.step.cancel()

    def _stopped(self, number: signal.Signals) -> BaseException:
        where = f" in {self.session.current}" if self.session.current else " before its first cell"
        fix = f"run it again; what was done is in {self.session.output.path}" if self.session.output else "run it again"
        what = f"stopped{where}\n  Interrupted: {number.name}"
        text = str(Problem(what, self.session.notebook, fix=fix))
        return Terminated(text) if number == signal.SIGTERM else KeyboardInterrupt(text)


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Hand SIGINT and SIGTERM to a handler in the loop, unless they are ignored; put back what was there."""
    chosen = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        chosen = {number: previous for number, previous in found.items() if previous is not signal.SIG_IGN}
    loop = asyncio.get_running_loop()
    for number in chosen:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number, previous in chosen.items():
            loop.remove_signal_handler(number)
            signal.signal(number, previous)


def _short(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
