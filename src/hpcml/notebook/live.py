"""What a person sees of a notebook while it runs: a log that grows line by line, and an output notebook that is whole.

The log goes to a file more often than to a terminal: there, colours are dropped and a progress bar, which redraws its
line many times a second, becomes its last state, with a sign of life every ``BAR_S`` seconds.
"""

import asyncio
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from .. import rundir
from ..errors import HpcmlError, JobFailed

BAR_S = 10.0
# A running notebook is written at most this often, and no more than a tenth of the time goes into writing it.
SAVE_S = 1.0
_SAVE_SHARE = 10
# Text without a newline is matched as a whole against what is shown already; beyond this it starts afresh.
_LONGEST_LINE = 8192

# ECMA-48: control sequences, operating system commands, two-byte escapes; also one cut off at the end of a message.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*(?:[@-~]|$)|\][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -Z\\-~]|$)")
_OVERWRITTEN = re.compile(r"[^\n\r]*\r+(?=[^\r\n])")
_BACKSPACED = re.compile(r"[^\x08]\x08")


def plain(text: str) -> str:
    """Return text without terminal escapes."""
    return _ANSI.sub("", text)


def settled(line: str) -> str:
    """Return what a terminal shows of one line once its carriage returns, backspaces and escapes are done."""
    line = plain(line).rstrip("\r").rpartition("\r")[2]
    while "\b" in line:
        shorter = _BACKSPACED.sub("", line)
        line = shorter if shorter != line else line.replace("\b", "")
    return line


def joined(before: str, text: str) -> str:
    """Return stream text with more appended; of a progress bar's line only the newest state stays."""
    if "\r" not in text and not before.endswith("\r"):
        return before + text
    head, newline, line = before.rpartition("\n")
    return head + newline + _OVERWRITTEN.sub("", line + text)


class Log:
    """A notebook's output as plain text, flushed as it arrives; a terminal gets it unchanged."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._tty = self._out.isatty()
        self._stream = ""
        self._line = ""  # the unfinished line as it came
        self._shown = ""  # what of it is written already
        self._open = False  # whether the last character written was not a newline
        self._written_at = time.monotonic()
        self._gone = False

    def say(self, text: str) -> None:
        """Write whole lines."""
        self._end_line()
        self._write((text if self._tty else plain(text)) + "\n")

    def stream(self, name: str, text: str) -> None:
        """Write a piece of a cell's stdout or stderr; it may end anywhere in a line."""
        if self._tty:
            self._write(text)
            return
        if name != self._stream:
            self._end_line()
            self._stream = name
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._finish(settled(line))
        self._show_unfinished()

    def _show_unfinished(self) -> None:
        text = settled(self._line)
        if "\r" in self._line or "\b" in self._line:
            if text and time.monotonic() - self._written_at >= BAR_S:
                self._finish(text)
            self._line = "\r" + self._line.rstrip("\r").rpartition("\r")[2] if len(self._line) > 256 else self._line
        elif len(text) > len(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text
            if len(self._line) > _LONGEST_LINE:
                self._line = self._shown = ""

    def _finish(self, text: str) -> None:
        """End a line: what is shown already is continued, or where it was redrawn stays above the new state."""
        if self._shown and not text.startswith(self._shown):
            self._write("\n")
            self._shown = ""
        self._write(text[len(self._shown) :] + "\n")
        self._shown = ""

    def _end_line(self) -> None:
        text = settled(self._line)
        if text != self._shown:
            self._finish(text)
        elif self._open:
            self._write("\n")
        self._line = self._shown = ""

    def _write(self, text: str) -> None:
        if not text or self._gone:
            return
        self._open = not text.endswith("\n")
        self._written_at = time.monotonic()
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:  # a closed pipe or a full disk: the notebook's own result is worth more than its log
            self._gone = True


class Output:
    """The output notebook's file, readable by the user alone: old or new, never half.

    It is put together on the node; shared storage sees one file written beside the target in one go, and a rename.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notebook: Any = None
        self.changed = False
        self.writes = 0
        self._warned = False

    def begin(self, notebook: Any) -> None:
        """Take the notebook that will grow and write it for the first time.

        Raises:
            HpcmlError: it can't be written there; better now than after a day.
        """
        self.notebook = notebook
        try:
            self._deliver(self._content())
        except OSError as error:
            raise HpcmlError(
                f"the executed notebook can't be written: {error.strerror}", origin=str(self.path),
                fix="choose a folder that exists and that you may write to, or free space",
            ) from None  # fmt: skip

    def write(self) -> None:
        """Write the notebook as it stands.

        Raises:
            JobFailed: it could not be written where it belongs; it then lies in the node's temporary folder.
        """
        content = self._content()
        try:
            self._deliver(content)
        except OSError as error:
            handle, local = tempfile.mkstemp(prefix="hpcml-", suffix=".ipynb")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            raise JobFailed(
                f"the executed notebook can't be written: {error.strerror}", origin=str(self.path),
                fix=f"free space or mend the folder's permissions; on {os.uname().nodename} it is {local}",
            ) from None  # fmt: skip

    async def keep(self) -> None:
        """Write the notebook as it changes, until cancelled; the file system never holds up the cells."""
        pause = SAVE_S
        while True:
            await asyncio.sleep(pause)
            if not self.changed:
                continue
            self.changed = False
            started = time.monotonic()
            try:
                await asyncio.to_thread(self._deliver, self._content())
            except OSError as error:
                if not self._warned:
                    print(
                        f"hpcml: warning: {self.path} can't be written: {error.strerror}", file=sys.stderr, flush=True
                    )
                self._warned = True
            pause = max(SAVE_S, _SAVE_SHARE * (time.monotonic() - started))

    def _content(self) -> bytes:
        import nbformat

        # Without nbformat's validation, which takes as long again; lone surrogates stay as JSON escapes.
        return (str(nbformat.v4.writes(self.notebook)) + "\n").encode("utf-8", "backslashreplace")

    def _deliver(self, content: bytes) -> None:
        rundir.write_bytes(self.path, content)
        self.writes += 1
