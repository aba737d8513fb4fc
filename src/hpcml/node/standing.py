"""Where the ranks of a training that stalls stand: from their stacks and what each told last, in words. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tracking.heartbeat import IDLE

_MOST_PLACES = 4  # named in a reason
_MOST_RANKS = 5
_FRAME = re.compile(r'  File "([^"]*)", line (\d+) in (.*)')
_THREAD = re.compile(r"\n(?=(?:Current t|T)hread )")
_OWN = Path(__file__).resolve().parents[1]
_LIBRARIES = re.compile(rf"/(?:site|dist)-packages/|/lib/python3[^/]*/|^<frozen|^{re.escape(str(_OWN))}/")


def place_of(stacks: str) -> str:
    """Return the innermost line of the user's own code in a dump's main thread, such as ``train.py line 25 in load``.

    Faulthandler writes the newest thread first, so the main one is the last.
    """
    frames = _FRAME.findall(_THREAD.split(stacks)[-1])
    own = next((frame for frame in frames if not _LIBRARIES.search(frame[0])), frames[0] if frames else None)
    if own is None:
        return ""
    file, line, function = own
    where = "line" if "/ipykernel_" in file else f"{Path(file).name} line"
    of_cell = " of its cell" if "/ipykernel_" in file else ""
    return f"{where} {line}{of_cell}" + ("" if function == "<module>" else f" in {function}")


def behind(ranks: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return the ranks that others wait for, as far as it shows.

    They are not in training, or else have done fewer steps, or else are the few at a place of their own.
    """
    waiting = {rank: one for rank, one in ranks.items() if "exit_code" not in one}
    if 0 < len(outside := [rank for rank, one in waiting.items() if one["phase"] == IDLE]) < len(waiting):
        return outside
    steps = {rank: one["step"] for rank, one in waiting.items()}
    if len(set(steps.values())) > 1:
        return [rank for rank, done in steps.items() if done == min(steps.values())]
    places = Counter(one["place"] for one in waiting.values())
    rare = {place for place, count in places.items() if 2 * count < len(waiting)}
    return [rank for rank, one in waiting.items() if one["place"] in rare]


def reason(still_s: float, ranks: Mapping[int, Mapping[str, Any]], world: int, run_id: str) -> str:
    """Say that a training has stalled, where its ranks stand, and where their stacks are.

    Args:
        still_s: without a step, in seconds.
        ranks: what each has left of itself: the watchdog's note, or the end marker.
    """
    steps = {one.get("step") for one in ranks.values()}
    together = next(iter(steps)) if len(steps) == 1 and len(ranks) == world else None
    groups: dict[str, list[int]] = {}
    for rank in range(world):
        groups.setdefault(_standing(ranks.get(rank, {}), together), []).append(rank)
    parts = _parts(sorted(groups.items(), key=lambda group: len(group[1])), world)
    after = f" after step {together}" if together else ""
    dumped = [rank for rank in range(world) if ranks.get(rank, {}).get("stacks")]
    return f"no step for {span(still_s)}{after}: {', '.join(parts)}; {_stacks(dumped, world)} (hpcml logs {run_id})"


def span(seconds: float) -> str:
    """Return a time for a person: ``45 s``, ``20 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _standing(told: Mapping[str, Any], together: int | None) -> str:
    """Say what follows a rank's number, with ``is`` for one rank and for several."""
    if not told:
        return "said nothing"
    if "exit_code" in told:
        return f"ended with exit code {told['exit_code']}"
    place = str(told.get("place", ""))
    where = f" ({place})" if place else ""
    if not told.get("begun") or (told["phase"] == IDLE and not told["step"]):
        return f"not yet in training{where}"
    if told["phase"] == IDLE:
        return f"past its training{where}"
    if together is not None:
        return f"at {place}" if place else f"at step {together}"
    return f"at step {told['step']}{where}"


def _parts(groups: Iterable[tuple[str, list[int]]], world: int) -> list[str]:
    """Name the ranks of each group, the largest last."""
    parts: list[str] = []
    left = world
    for standing, ranks in groups:
        left -= len(ranks)
        if len(parts) == _MOST_PLACES - 1 and left:
            return [*parts, f"the other {left + len(ranks)} elsewhere"]
        rest = parts and not left and len(ranks) > 1
        whose = "the others" if rest else "all ranks" if len(ranks) == world else _ranks(ranks)
        verb = "" if standing.startswith(("said", "ended")) else " is" if len(ranks) == 1 else " are"
        parts.append(f"{whose}{verb} {standing}")
    return parts


def _stacks(dumped: Sequence[int], world: int) -> str:
    if len(dumped) == world:
        return "stacks of all ranks are in their logs"
    return f"stacks of {_ranks(dumped)} are in the logs" if dumped else "no rank could write its stacks"


def _ranks(ranks: Sequence[int]) -> str:
    """Name ranks: ``rank 1``, ``ranks 0 to 3``, ``ranks 0, 2 and 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    if len(ranks) > _MOST_RANKS:
        return f"{len(ranks)} ranks from {ranks[0]} on"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
