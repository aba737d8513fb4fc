"""The journal of a run: append-only files of JSON lines, one writer a file, read by everybody.

A record is one line, handed to the kernel by a single ``write`` on an ``O_APPEND`` descriptor: the death of the
process loses nothing that was accepted. A thread in the background hands it on to the disk each second: the death of
the node loses at most the last one. Each record has ``t`` (milliseconds since the epoch) and ``kind``:

========== ==================================================================================================
kind       fields
========== ==================================================================================================
metric     ``step`` (int), ``values`` (name → float; NaN and infinities as they are)
sample     ``values`` (name → float): what telemetry measured
params     ``values`` (name → value): facts about the run that don't change
tags       ``values`` (name → text)
replicas   ``in_sync``, ``expected`` (int), ``devices`` (names), ``virtual`` (bool: virtual CPU devices)
progress   ``done``, ``total`` (int), ``unit`` (``cell`` or ``epoch``), ``text``
profile    ``first``, ``last`` (steps), ``folder``, ``split`` (name → ms a step), ``advice``
finish     ``state``, ``reason``: how the work says it ended
message    ``level`` (``info``, ``warning`` or ``error``), ``text``
lost       ``count`` (int): records that this file had no room for since the last such record
left_out   ``names`` (of metrics): values that one call of ``log`` gave and that are no numbers, or have no possible step
========== ==================================================================================================
"""

from .reader import Reader as Reader
from .reader import Unreadable as Unreadable
from .reader import left_out as left_out
from .reader import lost as lost
from .reader import problems as problems
from .reader import read as read
from .reader import scan as scan
from .writer import Journal as Journal
