"""Logs messages that violate the contract: one line per topic and fault, and from time to time how many there have been since.

A service of another version repeats what this one cannot read, some of it several times a second and for as long as both run.
Each message is counted (``caesura_bus_decode_errors_total``); the log names the problem without being flooded by it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from caesura.contract.codec import ContractError
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler, cut

_EVERY_S = 600.0  # s: between two lines about the same
_VALUES = re.compile(r"'[^']*'|\d+")
"""What differs between messages with the same fault: values, positions in the text."""

_log = get_logger("caesura.bus")


class RefusalLog:
    """The messages that one service received and could not read.

    Args:
        now: a monotonic clock, seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._sampler = Sampler(_EVERY_S, now)

    def say(self, topic: str, error: ContractError) -> None:
        """Log this message, unless a similar one was logged a short while ago."""
        left_out = self._sampler.due(f"{topic} {error.kind} {_VALUES.sub('', error.why)}")
        if left_out is not None:
            _log.warning(
                "bus.message_refused", topic=topic, kind=error.kind, why=cut(error.why), left_out=left_out
            )
