"""Messages that come in parts: split by their writer, joined by their readers. Pure.

No message grows with the fleet: a rollout's waves, the VMs of a large host and the plan of a large rollout have topics of their own.
What is retained names its parts by their etags, so a reader that holds an older or a newer part waits for the right one and never
mixes two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, Oversized, Received, size_bytes
from caesura.contract.envelope import Message
from caesura.contract.topics import channel_of

PARTS: Mapping[type[Message], type[Message]] = {
    m.RolloutState: m.WaveState,
    m.HostInventory: m.InventoryPart,
    m.RequestAnswered: m.PlanPart,
    m.OperationReported: m.ReportPart,
}
"""Maps a message type to the type of its parts."""

_FILL_BYTES = MAX_PAYLOAD_BYTES * 3 // 4
"""The share of a part for its records: the rest is for its envelope and its other members."""
_ANSWERS_HELD = 16
"""The most answers with incomplete parts: parts are not retained, so some answers may never be complete."""
_REPORTS_HELD = 2
"""The most incomplete reports per host: it runs one operation at a time."""

_NAME_BYTES = 12
"""JSON overhead around a host's name, or a set's with its domain."""

T = TypeVar("T")


class WholeRollout(m.RolloutState, frozen=True, kw_only=True):
    """A rollout with its waves, as a reader assembles it: never on the bus."""

    waves: tuple[m.WaveState, ...] = ()
    """In order. None for a rollout whose waves are no longer retained."""


def with_parts(kinds: Iterable[type[Message]]) -> list[type[Message]]:
    """The message types to subscribe to in order to receive these complete."""
    return [each for kind in kinds for each in (kind, PARTS.get(kind)) if each is not None]


def etag_of(content: Any) -> str:
    """The etag of a part's content; ``content`` is anything that msgspec encodes."""
    return blake2b(msgspec.json.encode(content), digest_size=6).hexdigest()


# --- splitting ---------------------------------------------------------------------------------------------


def inventory_in_parts(whole: m.HostInventory) -> tuple[m.HostInventory, list[m.InventoryPart]]:
    """The inventory as it is published: in one message if that can be sent, else without VMs and with its parts.

    If it still cannot be sent, the VMs are not what makes it large. More parts than ``MOST_PARTS`` are possible here, and readers
    refuse them: the bound on the VMs of a host keeps an inventory far below that.
    """
    if size_bytes(whole) <= MAX_PAYLOAD_BYTES:
        return whole, []
    parts = [
        m.InventoryPart(host=whole.host, part=number, etag=etag_of(vms), vms=vms)
        for number, vms in enumerate(_filled(whole.vms), 1)
    ]
    return replace(whole, vms=(), part_etags=tuple(each.etag for each in parts)), parts


def answer_in_parts(whole: m.RequestAnswered) -> tuple[m.RequestAnswered, list[m.PlanPart]]:
    """The answer as it is sent: in one message if possible, else with its plan in parts."""
    if whole.plan is None or size_bytes(whole) <= MAX_PAYLOAD_BYTES:
        return whole, []
    plan = whole.plan
    slices: list[dict[str, Any]] = []
    for wave in plan.waves:
        # Each slice of a wave names the hosts and sets of its VMs again.
        slices += [
            {"waves": (_slice_of(wave, vms),)}
            for vms in _filled(wave.vms, lambda vm: len(vm.host) + len(vm.set) + _NAME_BYTES)
        ]
    slices += [{"skipped": vms} for vms in _filled(plan.skipped)]
    slices += [{"refusals": refusals} for refusals in _filled(plan.refusals)]
    merged: list[dict[str, Any]] = []
    room = 0
    for each in slices:
        taken = len(msgspec.json.encode(each))
        if taken > room:
            merged.append({"waves": (), "skipped": (), "refusals": ()})
            room = _FILL_BYTES
        merged[-1] = {name: (*had, *each.get(name, ())) for name, had in merged[-1].items()}
        room -= taken
    parts = [m.PlanPart(request=whole.request, part=number, **each) for number, each in enumerate(merged, 1)]
    empty = replace(plan, waves=(), skipped=(), refusals=())
    return replace(whole, plan=empty, plan_parts=len(parts)), parts


def report_in_parts(whole: m.OperationReported) -> tuple[m.OperationReported, list[m.ReportPart]]:
    """The report as it is sent: in one message if possible, else without VMs, and their results in parts."""
    if size_bytes(whole) <= MAX_PAYLOAD_BYTES:
        return whole, []
    parts = [
        m.ReportPart(host=whole.host, operation=whole.operation, part=number, vms=vms)
        for number, vms in enumerate(_filled(whole.vms), 1)
    ]
    return replace(whole, vms=(), vm_parts=len(parts)), parts


def _slice_of(wave: m.PlannedWave, vms: tuple[m.PlannedVm, ...]) -> m.PlannedWave:
    hosts = {vm.host for vm in vms}
    sets = {vm.set for vm in vms}
    return replace(
        wave,
        vms=vms,
        hosts=tuple(each for each in wave.hosts if each in hosts),
        domains={name: domain for name, domain in wave.domains.items() if name in sets},
    )


def _filled(records: Sequence[T], besides: Callable[[T], int] = lambda _: 0) -> Iterator[tuple[T, ...]]:
    """The records in order, grouped by as many as fit into one part.

    Args:
        besides: the most bytes that a record takes in its part in addition to its own.
    """
    some: list[T] = []
    room = _FILL_BYTES
    for record in records:
        taken = len(msgspec.json.encode(record)) + 1 + besides(record)
        if some and taken > room:
            yield tuple(some)
            some, room = [], _FILL_BYTES
        some.append(record)
        room -= taken
    if some:
        yield tuple(some)


# --- joining -----------------------------------------------------------------------------------------------


class Joiner:
    """A reader's parts, and the messages that wait for their parts.

    A message without parts passes through. One whose parts have not all arrived is held back; the reader keeps the previous one
    until the new one is complete.

    Args:
        wanted: whether a part of a message that is not retained is kept; without it all are kept, within bounds.
    """

    def __init__(self, wanted: Callable[[Message], bool] = lambda _: True) -> None:
        self._wanted = wanted
        self._waves: dict[str, dict[int, m.WaveState]] = {}
        self._vms: dict[str, dict[int, m.InventoryPart]] = {}
        self._plans: dict[tuple[str, str], dict[int, m.PlanPart]] = {}
        self._reports: dict[str, dict[str, dict[int, m.ReportPart]]] = {}
        self._waiting: dict[tuple[type[Message], str], Received] = {}

    def take(self, received: Received) -> Received | None:
        """The complete message that this one is or completes; None: it waits, or it is a part of one that waits.

        Raises:
            Oversized: joined, it would name more VMs than a host can have.
        """
        message = received.message
        match message:
            case m.WaveState():
                self._waves.setdefault(message.rollout, {})[message.wave] = message
                return self._completed(m.RolloutState, message.rollout, self._rollout)
            case m.RolloutState():
                self._waiting[m.RolloutState, message.rollout] = received
                return self._completed(m.RolloutState, message.rollout, self._rollout)
            case m.InventoryPart():
                self._vms.setdefault(message.host, {})[message.part] = message
                return self._completed(m.HostInventory, message.host, self._inventory)
            case m.HostInventory():
                self._waiting[m.HostInventory, message.host] = received
                return self._completed(m.HostInventory, message.host, self._inventory)
            case m.PlanPart():
                client = received.parameters["client"]
                self._parts_of_plan(client, message.request)[message.part] = message
                return self._completed(m.RequestAnswered, f"{client}/{message.request}", self._answer)
            case m.RequestAnswered() if message.plan_parts:
                client = received.parameters["client"]
                self._parts_of_plan(client, message.request)
                self._waiting[m.RequestAnswered, f"{client}/{message.request}"] = received
                return self._completed(m.RequestAnswered, f"{client}/{message.request}", self._answer)
            case m.ReportPart():
                if not self._wanted(message):
                    return None
                parts = self._parts_of_report(message.host, message.operation)
                parts[message.part] = message
                if sum(len(part.vms) for part in parts.values()) > m.MOST_TARGETS:
                    self._forget_report(message.host, message.operation)
                    raise _too_many(received)
                return self._completed(
                    m.OperationReported, f"{message.host}/{message.operation}", self._report
                )
            case m.OperationReported() if message.vm_parts:
                self._parts_of_report(message.host, message.operation)
                name = f"{message.host}/{message.operation}"
                self._waiting[m.OperationReported, name] = received
                return self._completed(m.OperationReported, name, self._report)
            case _:
                return received

    def clear(self, topic: str) -> None:
        """A retained message was removed."""
        for kind, part in PARTS.items():
            if (found := channel_of(kind).match(topic)) is not None:
                self._waiting.pop((kind, next(iter(found.values()))), None)
            if (found := channel_of(part).match(topic)) is None:
                continue
            if part is m.WaveState:
                _removed(self._waves, found["rollout"], found["wave"])
            elif part is m.InventoryPart:
                _removed(self._vms, found["host"], found["part"])

    def waiting(self) -> list[str]:
        """The incomplete messages, by message type and name: for diagnosis."""
        return sorted(f"{kind.TYPE} {name}" for kind, name in self._waiting)

    def _completed(
        self, kind: type[Message], name: str, complete: Callable[[Received], Message | None]
    ) -> Received | None:
        head = self._waiting.get((kind, name))
        whole = complete(head) if head is not None else None
        if head is None or whole is None:
            return None
        self._waiting.pop((kind, name), None)
        return replace(head, message=whole)

    def _rollout(self, head: Received) -> Message | None:
        state = head.message
        assert isinstance(state, m.RolloutState)  # noqa: S101 - for mypy
        known = self._waves.get(state.rollout, {})
        waves = [known.get(index) for index in range(len(state.wave_etags))]
        found = tuple(wave for wave in waves if wave is not None)
        if tuple(wave.etag for wave in found) != state.wave_etags:
            return None
        if not state.wave_etags:
            self._waves.pop(state.rollout, None)
        members = {name: getattr(state, name) for name in m.RolloutState.__struct_fields__}
        return WholeRollout(**members, waves=found)

    def _inventory(self, head: Received) -> Message | None:
        state = head.message
        assert isinstance(state, m.HostInventory)  # noqa: S101 - for mypy
        if not state.part_etags:
            return state
        known = self._vms.get(state.host, {})
        parts = [known.get(number) for number in range(1, len(state.part_etags) + 1)]
        found = [part for part in parts if part is not None]
        if tuple(part.etag for part in found) != state.part_etags:
            return None
        if sum(len(part.vms) for part in found) > m.MOST_TARGETS:
            del self._waiting[m.HostInventory, state.host]
            raise _too_many(head)
        return replace(state, vms=tuple(vm for part in found for vm in part.vms))

    def _answer(self, head: Received) -> Message | None:
        answer = head.message
        assert isinstance(answer, m.RequestAnswered)  # noqa: S101 - for mypy
        key = head.parameters["client"], answer.request
        known = self._plans.get(key, {})
        parts = [known.get(number) for number in range(1, answer.plan_parts + 1)]
        found = [part for part in parts if part is not None]
        if len(found) != answer.plan_parts or answer.plan is None:
            return None
        self._plans.pop(key, None)
        waves: dict[int, m.PlannedWave] = {}
        for wave in (each for part in found for each in part.waves):
            had = waves.get(wave.wave)
            waves[wave.wave] = wave if had is None else _merged(had, wave)
        plan = replace(
            answer.plan,
            waves=tuple(waves.values()),
            skipped=tuple(vm for part in found for vm in part.skipped),
            refusals=tuple(each for part in found for each in part.refusals),
        )
        return replace(answer, plan=plan)

    def _parts_of_plan(self, client: str, request: str) -> dict[int, m.PlanPart]:
        """The parts of a plan received so far; the oldest plan is dropped when there are too many."""
        parts = self._plans.setdefault((client, request), {})
        while len(self._plans) > _ANSWERS_HELD:
            oldest = next(iter(self._plans))
            del self._plans[oldest]
            self._waiting.pop((m.RequestAnswered, "/".join(oldest)), None)
        return parts

    def _parts_of_report(self, host: str, operation: str) -> dict[int, m.ReportPart]:
        """The parts of a report received so far; the host's oldest report is dropped when there are too many."""
        of_host = self._reports.setdefault(host, {})
        parts = of_host.setdefault(operation, {})
        while len(of_host) > _REPORTS_HELD:
            self._forget_report(host, next(iter(of_host)))
        return parts

    def _forget_report(self, host: str, operation: str) -> None:
        of_host = self._reports.get(host, {})
        of_host.pop(operation, None)
        if not of_host:
            self._reports.pop(host, None)
        self._waiting.pop((m.OperationReported, f"{host}/{operation}"), None)

    def _report(self, head: Received) -> Message | None:
        report = head.message
        assert isinstance(report, m.OperationReported)  # noqa: S101 - for mypy
        of_host = self._reports.get(report.host, {})
        known = of_host.get(report.operation, {})
        parts = [known.get(number) for number in range(1, report.vm_parts + 1)]
        found = [part for part in parts if part is not None]
        if len(found) != report.vm_parts:
            return None
        self._forget_report(report.host, report.operation)
        return replace(report, vms=tuple(vm for part in found for vm in part.vms))


def _merged(one: m.PlannedWave, other: m.PlannedWave) -> m.PlannedWave:
    return replace(
        one,
        vms=(*one.vms, *other.vms),
        hosts=tuple(dict.fromkeys((*one.hosts, *other.hosts))),
        domains={**one.domains, **other.domains},
    )


def _too_many(received: Received) -> Oversized:
    return Oversized(
        received.channel.topic(**received.parameters), f"more than {m.MOST_TARGETS} VMs in its parts"
    )


def _removed(parts: dict[str, dict[int, T]], name: str, number: str) -> None:
    held = parts.get(name, {})
    if number.isdigit():
        held.pop(int(number), None)
    if not held:
        parts.pop(name, None)
