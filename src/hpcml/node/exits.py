"""What a process ends with. ``atexit`` does not tell, and none of Python's hooks sees ``SystemExit``.

While it is watched, ``sys.exit``, ``exit`` and ``quit`` raise a ``SystemExit`` that notes its own end: one that Python's
top level lets go of, with no frame above, ends the process; one that somebody caught does not count. A bare
``raise SystemExit(3)`` goes unseen, and so does a ``from sys import exit`` before the watch begins.
"""

import builtins
import contextlib
import gc
import sys
import threading
from typing import Any, NoReturn

_PLACES = ((sys, "exit"), (builtins, "exit"), (builtins, "quit"))
_originals: list[Any] = []
_alive: set[int] = set()  # exceptions that nobody has let go of yet
_uncaught: list[object] = []
_ending = False


class _Exit(SystemExit):
    """A ``SystemExit`` that notes where it ends."""

    def __init__(self, *status: object) -> None:
        super().__init__(*status)
        _alive.add(id(self))

    def __del__(self) -> None:
        _alive.discard(id(self))
        try:
            caught = not _ending and sys._getframe(1) is not None
        except ValueError:  # call stack is not deep enough
            caught = False
        if not caught:
            _uncaught.append(self.code)


class _Quit:
    """``exit`` and ``quit`` of the site module, which close stdin."""

    def __init__(self, original: object) -> None:
        self._original = original

    def __repr__(self) -> str:
        return repr(self._original)

    def __call__(self, code: object = None) -> NoReturn:
        with contextlib.suppress(Exception):
            sys.stdin.close()
        _exit(code)


def _exit(status: object = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status), noted by hpcml."""
    if threading.current_thread() is not threading.main_thread():
        raise SystemExit(status)  # ends the thread only
    raise _Exit(status)  # no name for it here: this frame, which its traceback holds, would hold it in turn


def watch() -> None:
    """Begin to watch; a second call changes nothing."""
    if not _originals:
        _uncaught.clear()
        _originals.extend(getattr(place, name, None) for place, name in _PLACES)
        for (place, name), original in zip(_PLACES, _originals, strict=True):
            if original is not None:  # python -S has no exit and quit
                setattr(place, name, _exit if place is sys else _Quit(original))


def unwatch() -> None:
    """Put everything back, but for what somebody else has replaced since."""
    for (place, name), original in zip(_PLACES, _originals, strict=False):
        if original is not None and (getattr(place, name, None) is _exit or isinstance(getattr(place, name), _Quit)):
            setattr(place, name, original)
    _originals.clear()


def code() -> object:
    """Return, from within ``atexit``, what this process was told to exit with; None for nothing or 0's like."""
    global _ending
    if _alive and not _uncaught:
        _ending = True  # a traceback may hold the frame that holds the exception
        gc.collect()
        _ending = False
    return _uncaught[-1] if _uncaught else None
