"""A script that hpcml's own refusal ends: it says in plain words what to do, without frames of hpcml's files."""

import functools
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from ..errors import HpcmlError
from . import bootstrap

P = ParamSpec("P")
R = TypeVar("R")


def refusing(call: Callable[P, R]) -> Callable[P, R]:
    """Make a function's ``HpcmlError``, where nobody catches it, end a script in words and with its ``exit_code``.

    Every other exception is shown as before, and so is an ``HpcmlError`` that comes from elsewhere. IPython and
    notebooks ask the error itself (``_render_traceback_``).
    """

    @functools.wraps(call)
    def refused(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except HpcmlError as error:
            if bootstrap.HANDOVER not in os.environ:  # a worker finds the reason in the log, where the traceback ends
                _say_at_the_end(error)
            raise

    return refused


def _say_at_the_end(ours: HpcmlError) -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if error is not ours:
            before(kind, error, trace)
            return
        print(f"hpcml: {error}", file=sys.stderr, flush=True)
        if not (sys.flags.interactive or hasattr(sys, "ps1")):  # a prompt goes on
            raise SystemExit(ours.exit_code)  # of a hook it is heeded: the process ends with it

    sys.excepthook = hook
