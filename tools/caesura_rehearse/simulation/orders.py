"""What can be ordered: an event of each type, with its notice and its words. Pure.

Source of notices, durations and descriptions: Microsoft's "Scheduled Events for Linux VMs" and its overview (azure-compute-docs).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura.contract.messages import EventType
from caesura.lifecycle.budget import usable_s
from caesura.runtime.errors import ConfigError

MAX_PAUSE_S = usable_s(30.0)
"""s: what a budget of 30 s, the longest that there is, leaves for a pause; the rest is for the resume, also by the guard."""

MINIMUM_NOTICE_S: dict[EventType, float] = {
    "Freeze": 15 * 60.0,
    "Reboot": 15 * 60.0,
    "Redeploy": 10 * 60.0,
    "Preempt": 30.0,
    "Terminate": 5 * 60.0,
}
"""s between publication and NotBefore, at least, on the real one; Terminate: the shortest that its owner may choose."""

_DESCRIPTIONS: dict[tuple[EventType, str], str] = {
    ("Freeze", "Platform"): "Host server is undergoing maintenance.",
    ("Reboot", "User"): "Virtual machine is going to be restarted as requested by authorized user.",
    ("Redeploy", "User"): "Virtual machine is going to be redeployed as requested by authorized user.",
    ("Redeploy", "Platform"): "Virtual machine has encountered a failure.",
}

EVENT_NAMES: dict[str, EventType] = {each.lower(): each for each in MINIMUM_NOTICE_S}
"""The words of the command line."""


class OrderRefused(ConfigError):
    """The order cannot be carried out as given."""


class LaterPause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more pause while the event is Started, until it vanishes further and shorter ones may follow (linux/scheduled-events.md)."""

    after_s: Annotated[float, Meta(ge=0, le=86400)]
    """Seconds from the end of the pause before it."""
    duration_s: Annotated[float, Meta(gt=0, le=MAX_PAUSE_S)]


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One event to be announced and carried out."""

    event: EventType = "Freeze"
    notice_s: Annotated[float, Meta(ge=0, le=7 * 86400)] | None = None
    """Seconds until NotBefore; None: the real one's minimum. 0: no notice at all, the event appears as Started."""
    duration_s: Annotated[float, Meta(ge=0, le=MAX_PAUSE_S)] = 9.0
    """Seconds of the pause, for a Freeze; 0: announced and started, and nothing pauses, as a network update."""
    later_pauses: tuple[LaterPause, ...] = ()
    """Of a Freeze, after the first."""
    vms: tuple[str, ...] = ()
    """The VMs concerned, of one update domain of their set. Without VMs and sets: one event is for the first set's lowest update domain, a
    rollout for all VMs."""
    sets: tuple[str, ...] = ()
    """The sets concerned, their update domains one after the other."""
    source: Literal["Platform", "User"] = "Platform"
    description: Annotated[str, Meta(max_length=4096)] | None = None
    shown_duration_s: Annotated[int, Meta(ge=-1, le=86400)] | None = None
    """``DurationInSeconds``; None: the pause rounded up for a Freeze, -1 for the others."""

    checks_s: Annotated[float, Meta(ge=0, le=86400)] = 2.0
    """Seconds after the impact for which the event is still shown as Started. The real one checks the VM for some ten minutes; a client
    that polls once a second must see it, or the end looks like a cancellation."""
    soak_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Seconds between the end of one update domain's events and the announcement of the next one's."""
    approval_starts: bool = True
    """Whether an approval starts the event at once. False: it starts at NotBefore all the same, as where the platform is not ready before."""
    grace_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """Seconds between SIGTERM and SIGKILL, for the types that end the program."""

    @property
    def notice(self) -> float:
        """Seconds between publication and NotBefore."""
        return MINIMUM_NOTICE_S[self.event] if self.notice_s is None else self.notice_s

    @property
    def impact_s(self) -> float:
        """Seconds from the beginning of the first pause to the end of the last one; 0: nothing pauses."""
        if self.event != "Freeze":
            return 0.0
        return self.duration_s + sum(each.after_s + each.duration_s for each in self.later_pauses)

    @property
    def shown_duration(self) -> int:
        """``DurationInSeconds``."""
        if self.shown_duration_s is not None:
            return self.shown_duration_s
        return -int(-self.duration_s // 1) if self.event == "Freeze" else -1

    @property
    def text(self) -> str:
        """``Description``."""
        return (
            self.description
            if self.description is not None
            else _DESCRIPTIONS.get((self.event, self.source), "")
        )


def order_from(arguments: object) -> Order:
    """The order that JSON or keyword arguments describe.

    Raises:
        OrderRefused: naming the argument.
    """
    try:
        return msgspec.convert(arguments, Order)
    except msgspec.ValidationError as error:
        raise OrderRefused(f"the order is not valid: {error}") from error
