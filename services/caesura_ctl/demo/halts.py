"""Which halts only say that something was away: those may be resumed without a person. Pure.

A resume tells the coordinator that the operator accepts what was found, and a wave whose hosts all did their part is
then not verified again. So only reasons that are known to say "was away, and nothing was found" are in the list;
whatever else halts, and whatever is new, is for a person to judge. A host that never reported (``lost``) is not in it
either: what it reports later is not verified by a resume.

The reason is text, since the published state of a rollout has nothing more. ``tests/unit/ctl/test_halts.py`` has the
coordinator and the host updater themselves make each text that is matched here.
"""

from __future__ import annotations

import re

_HEADS = ("cannot go on: ", "not verified in time: ")
"""What a coordinator puts before things that were in the way for too long."""

_NAME = r"[\w.-]+"
_SECONDS = r"\d+(\.\d+)?"
_ENDED = rf"{_NAME} (failed|cancelled): "

_AWAY = re.compile(
    "|".join(
        (
            # Gates of the coordinator: nothing was begun, or all was verified but for this.
            rf"{_NAME} is offline",
            rf"{_NAME} has not reported an inventory",
            rf"{_NAME} has not acknowledged epoch \d+",
            rf"{_NAME} has no pause guard",
            rf"{_NAME}: its host {_NAME} is offline",
            rf"{_NAME}: its agent is offline",
            rf"no answer of the agent by NotBefore: {_NAME}(, {_NAME})*",
            # The host heard of it too late, or was on its way out: nothing was touched.
            rf"{_NAME} refused: the command came {_SECONDS} s after its not_after",
            rf"{_NAME} refused: the host updater is stopping",
            # The host was stopped, or its updater or guard died. Its VMs ran again before it said so; the wave is
            # tried again on it, and verified.
            rf"{_ENDED}aborted: the host updater is stopping",
            rf"{_ENDED}the host was started anew during the operation",
            rf"{_ENDED}host updater died before anything was frozen",
            rf"{_ENDED}host updater died during the operation",
            rf"the VMs were paused for {_SECONDS} s at most",
            rf"{_ENDED}host updater died while VMs were frozen",
            rf"the pause guard resumed them after {_SECONDS} s \([^;]*\)",
            rf"{_ENDED}nothing was frozen: the pause guard died",
            rf"{_ENDED}the pause guard died after {_SECONDS} s, so all VMs were resumed",
        )
    )
)
"""One of the things that a reason lists."""


def was_away(reason: str) -> bool:
    """Whether everything that the reason lists is something that was away, and is no finding."""
    for head in _HEADS:
        reason = reason.removeprefix(head)
    return all(_AWAY.fullmatch(each) for each in reason.split("; "))
