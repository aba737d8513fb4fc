"""Tasks shared out to forked processes, which tell the parent how far they are.

Why not ``concurrent.futures``: when its parent is killed its processes wait for ever, and what they inherit (a lock)
stays held. These end at the next word they want to say. A forked child sees all that the parent has read without any
copying, and runs nothing but the work: plain system calls, no framework.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NoReturn

from ...errors import HpcmlError, Problem
from ...filesystem import NETWORK, file_system

Message = dict[str, Any]
Say = Callable[[Message], object]

# Opening a small file on Lustre is 2 ms of waiting: more processes than cores, but no load for a login node.
_AT_LEAST_ON_NETWORK = 16
_PIPE = 65_536  # bytes that fit into a pipe, pipe(7)
_NUMBER = 4


def default_count(*paths: Path) -> int:
    """Return how many processes to use: one for each core; at least 16 where a path lies on a network file system."""
    cores = len(os.sched_getaffinity(0))
    slow = any(file_system(path.resolve()) in NETWORK for path in paths)
    return max(cores, _AT_LEAST_ON_NETWORK) if slow else cores


def run(work: Callable[[int, Say], None], tasks: Sequence[int], count: int, hear: Say) -> None:
    """Do each task once, in some order, in up to ``count`` processes; in this one where a second has nothing to do.

    Args:
        work: does one task, and may say things, which are JSON.
        hear: called in this process with what is said.

    Raises:
        HpcmlError, OSError: as ``work`` raised it first; the other processes are killed.
    """
    count = min(count, len(tasks))
    if count <= 1:
        for task in tasks:
            work(task, hear)
        return
    queue = _queue(tasks)
    children: list[_Child] = []
    try:
        for _ in range(count):
            children.append(_fork(work, tasks, queue, children))
        _listen(children, hear)
    finally:
        os.close(queue)
        for child in children:
            child.end()


@dataclass
class _Child:
    """A process and the pipe that it talks through."""

    pid: int
    pipe: int
    heard: bytearray = field(default_factory=bytearray)
    reaped: bool = False

    def end(self) -> None:
        os.close(self.pipe)
        if not self.reaped:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def messages(self) -> list[Message] | None:
        """What has been said since; None when nothing more can come. Waits for at least a part of a message."""
        piece = os.read(self.pipe, _PIPE)
        self.heard += piece
        *lines, rest = self.heard.split(b"\n")
        self.heard = rest
        return [json.loads(line) for line in lines] if piece else None

    def check_end(self) -> None:
        """Wait for the process, which has closed its pipe; a death is an error."""
        _, status = os.waitpid(self.pid, 0)
        self.reaped = True
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            fix = "more memory, or fewer processes with --workers; run it again: it goes on"
            why = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            raise HpcmlError(f"one of the processes was ended by {name}{why}", fix=fix)
        if status:
            raise RuntimeError(f"a process ended with status {os.waitstatus_to_exitcode(status)} and said nothing")


def _queue(tasks: Sequence[int]) -> int:
    """A pipe with positions in ``tasks``: each process takes the next one, which a pipe makes atomic.

    Of so many that they don't fit only each k-th position: it stands for k tasks.
    """
    readable, writable = os.pipe()
    step = _step(tasks)
    os.write(writable, b"".join(at.to_bytes(_NUMBER) for at in range(0, len(tasks), step)))
    os.close(writable)
    return readable


def _step(tasks: Sequence[int]) -> int:
    return -(-len(tasks) // (_PIPE // _NUMBER))


def _fork(work: Callable[[int, Say], None], tasks: Sequence[int], queue: int, older: Sequence[_Child]) -> _Child:
    readable, writable = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads: a lock one of them holds stays locked. The child takes none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(readable)
        for child in older:
            os.close(child.pipe)
        _serve(work, tasks, queue, writable)
    os.close(writable)
    return _Child(pid, readable)


def _serve(work: Callable[[int, Say], None], tasks: Sequence[int], queue: int, pipe: int) -> NoReturn:
    """The child's life; it never returns into the parent's code."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends its children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)

        def say(message: Message) -> None:
            text = memoryview(json.dumps(message).encode() + b"\n")
            while text:
                text = text[os.write(pipe, text) :]

        try:
            step = _step(tasks)
            while number := os.read(queue, _NUMBER):
                first = int.from_bytes(number)
                for task in tasks[first : first + step]:
                    work(task, say)
            code = 0
        except BrokenPipeError:  # the parent has gone
            pass
        except HpcmlError as error:
            say({"raised": [vars(problem) for problem in error.problems]})
        except OSError as error:
            say({"errno": error.errno, "strerror": error.strerror, "file": _text(error.filename)})
        except BaseException:
            say({"crash": traceback.format_exc()})
    finally:
        os._exit(code)


def _listen(children: Sequence[_Child], hear: Say) -> None:
    with DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, EVENT_READ, child)
        while selector.get_map():
            for key, _ in selector.select():
                messages = key.data.messages()
                if messages is None:
                    selector.unregister(key.fileobj)
                    key.data.check_end()
                for message in messages or ():
                    _raise_again(message)
                    hear(message)


def _raise_again(message: Message) -> None:
    if "raised" in message:
        raise HpcmlError(Problem(**problem) for problem in message["raised"])
    if "errno" in message:
        raise OSError(message["errno"], message["strerror"], message["file"])
    if "crash" in message:
        raise RuntimeError(message["crash"])


def _text(name: object) -> str | None:
    return os.fsdecode(name) if isinstance(name, str | bytes) else None
