"""The VMs of a rehearsal, and what an order makes of them: waves, of which each pauses one update domain of a set. Pure.

As the coordinator plans it: VMs of two update domains of a set never pause at once (I1); of several sets, those of the same
update domain share a host, so that they pause together.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec

from caesura_rehearse.simulation.orders import Order, OrderRefused

MOST_VMS = 50
"""Each is a program with its own first process and metadata address on one machine."""
UPDATE_DOMAINS = 5
"""Of a set, if nothing else is said. Source: availability-set-overview.md: five by default, VMs are assigned round robin."""
MOST_UPDATE_DOMAINS = 20


class Placed(Protocol):
    """A VM with its place."""

    @property
    def vm(self) -> str:
        """Its name."""

    @property
    def set(self) -> str:
        """Its availability set."""

    @property
    def update_domain(self) -> int:
        """Its update domain in the set."""


class SetMember(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that a rehearsal is to have."""

    vm: str
    set: str
    update_domain: int = 0
    number: int = 1
    """Its place in its set, counted from 1."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The VMs of one event: of one update domain of one set."""

    set: str
    update_domain: int
    vms: tuple[str, ...]


Wave = tuple[Part, ...]
"""What is paused at the same time: one event for each set."""


def members_of(set_name: str, count: int, update_domains: int = UPDATE_DOMAINS) -> tuple[SetMember, ...]:
    """A set's VMs: ``web-1``, ``web-2`` and so on, spread over the update domains round robin."""
    return tuple(
        SetMember(
            vm=f"{set_name}-{number}",
            set=set_name,
            update_domain=(number - 1) % update_domains,
            number=number,
        )
        for number in range(1, count + 1)
    )


def plan_waves(order: Order, members: Sequence[Placed]) -> tuple[Wave, ...]:
    """The waves of an order: one for the VMs that it names, else one for each update domain of the sets that it names, or of all.

    Raises:
        OrderRefused: it names VMs or sets that there are not, or VMs of two update domains of a set.
    """
    if order.vms and order.sets:
        raise OrderRefused("vms and sets exclude each other")
    if not members:
        raise OrderRefused("there is no VM")
    check_known("VM", order.vms, [each.vm for each in members])
    check_known("set", order.sets, [each.set for each in members])
    if order.vms:
        return (_wave_of([each for each in members if each.vm in order.vms]),)
    concerned = [each for each in members if not order.sets or each.set in order.sets]
    domains = sorted({each.update_domain for each in concerned})
    return tuple(_wave_of([each for each in concerned if each.update_domain == domain]) for domain in domains)


def first_event(order: Order, members: Sequence[Placed]) -> Part:
    """The VMs of an order that is one event: those that it names, else the lowest update domain of the first set.

    Raises:
        OrderRefused: as ``plan_waves``; also VMs of two sets, or a set with several update domains.
    """
    waves = plan_waves(order, members)
    if order.vms or order.sets:
        parts = [part for wave in waves for part in wave]
        if len(parts) > 1:
            raise OrderRefused(
                "one event is for VMs of one update domain of one set: order a rollout, which takes them one after the other"
            )
        return parts[0]
    return next(part for wave in waves for part in wave if part.set == members[0].set)


def check_known(kind: str, names: Collection[str], known: Collection[str]) -> None:
    """Raises OrderRefused, with the name that may be meant: one of ``names`` is not known."""
    for name in names:
        if name not in known:
            raise OrderRefused(f"there is no {kind} {name} here{hint_for(name, known)}")


def hint_for(name: str, known: Collection[str]) -> str:
    """Which of the known names may be meant, or all of them, to end a sentence with."""
    near = difflib.get_close_matches(name, list(known), n=1)
    listed = ", ".join(dict.fromkeys(known))
    if not near:
        return f": {listed or 'there is none'}"
    return f", did you mean {near[0]}?" + (f" There are: {listed}" if len(set(known)) > 1 else "")


def _wave_of(members: Sequence[Placed]) -> Wave:
    parts: dict[str, list[Placed]] = {}
    for each in members:
        parts.setdefault(each.set, []).append(each)
    for name, placed in parts.items():
        other = next((each for each in placed if each.update_domain != placed[0].update_domain), None)
        if other is not None:
            raise OrderRefused(
                f"{placed[0].vm} and {other.vm} are in two update domains of {name}, which never pause at the same time: "
                "order the set, which takes them one after the other"
            )
    return tuple(
        Part(set=name, update_domain=placed[0].update_domain, vms=tuple(each.vm for each in placed))
        for name, placed in parts.items()
    )
