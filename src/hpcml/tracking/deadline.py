"""A bound on the whole of an HTTP call: the timeout of requests is one of each read, and a server may drip bytes."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

# A slow line still carries a file at this rate (bytes/s).
SLOWEST = 100_000
# urllib3's longest pause between two tries (Retry.DEFAULT_BACKOFF_MAX, seconds).
LONGEST_BACKOFF_S = 120


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound every call of requests meanwhile, from its connection to the last byte of its answer.

    A call may take twice its timeout, for connecting and for reading, and what its body needs on a slow line; a call
    without a timeout is not bounded. One that is given up goes on in a daemon thread, which holds nobody up.
    """
    from requests import Session
    from requests.exceptions import ReadTimeout

    send = Session.send

    def within(self: Any, request: Any, **options: Any) -> Any:
        limit_s = _limit_s(self, request, options.get("timeout"))
        if limit_s is None:
            return send(self, request, **options)
        ended = threading.Event()
        answer: list[Any] = []
        trouble: list[BaseException] = []

        def call() -> None:
            try:
                answer.append(send(self, request, **options))
            except BaseException as error:
                trouble.append(error)
            ended.set()

        threading.Thread(target=call, name="hpcml-call", daemon=True).start()
        if not ended.wait(limit_s):
            raise ReadTimeout(f"no whole answer within {limit_s:.0f} s", request=request)
        if trouble:
            raise trouble[0]
        return answer[0]

    Session.send = within  # type: ignore[method-assign,unused-ignore]
    try:
        yield
    finally:
        Session.send = send  # type: ignore[method-assign,unused-ignore]


def _limit_s(session: Any, request: Any, timeout: Any) -> float | None:
    waits = [wait for wait in (timeout if isinstance(timeout, tuple) else (timeout, timeout)) if wait]
    if not waits:
        return None
    retries = getattr(session.get_adapter(request.url).max_retries, "total", 0) or 0
    body_s = int(request.headers.get("Content-Length") or 0) / SLOWEST
    return float(sum(waits) + body_s) * (retries + 1) + LONGEST_BACKOFF_S * retries
