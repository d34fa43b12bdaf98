"""Metrics and live page as views of one fold: after every message they show what a naive rebuild from everything that was said would."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Header, Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import channel_of
from caesura_metrics_exporter.live.page_json import Delta
from caesura_metrics_exporter.live.page_state import LivePageState
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_metrics_exporter.rollout_index import ROLLOUTS_KEPT, RolloutIndex
from caesura_metrics_exporter.state_fold import StateFold
from caesura_testing.rollouts import wave_state, whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)
HOSTS = ("h1", "h2", "h3")
VMS = ("a", "b", "c", "d")
SETS = ("s1", "s2")
OPERATION = "op1"
OVER = ("completed", "aborted")


class Exporter:
    """Both views of one fold, fed as the service feeds them."""

    def __init__(self) -> None:
        self.folded = StateFold()
        self.fleet = FleetMetricsView(self.folded)
        self.live = LivePageState(self.folded)
        self.now_s = 0.0

    def take(self, message: Message) -> None:
        self.now_s += 0.01
        at = AT + timedelta(seconds=self.now_s)
        header = Header(specversion="1.0", id="1", source="/test", type=type(message).TYPE, time=at)
        kind = m.RolloutState if isinstance(message, WholeRollout) else type(message)
        received = Received(channel_of(kind), {}, header, message)
        step = self.folded.take(message, self.now_s)
        self.fleet.take(message, self.now_s, fresh=True, step=step)
        self.live.take(received, at.timestamp(), self.now_s, fresh=True, step=step)

    def clear(self, topic: str) -> None:
        self.now_s += 0.01
        step = self.folded.clear(topic, self.now_s)
        self.fleet.clear(topic, self.now_s, step)
        self.live.clear(topic, AT.timestamp() + self.now_s, self.now_s, step)

    def expire(self) -> None:
        self.live.expire(AT.timestamp() + self.now_s, self.now_s)

    def vms_by_state(self) -> dict[tuple[str, ...], float]:
        (family,) = [each for each in fleet_families(self.fleet, self.now_s) if each.name == "caesura_vms"]
        return {labels: value for labels, value in family.values.items() if value}


class Naive:
    """What was said, and what follows from it, looked through for every answer."""

    def __init__(self) -> None:
        self.inventories: dict[str, m.HostInventory] = {}
        self.owners: dict[str, m.VmOwner] = {}
        self.online: dict[str, bool] = {}
        self.hosts: set[str] = set()
        self.offline: set[str] = set()
        self.leads = "unknown"
        self.rollouts: dict[str, WholeRollout] = {}
        self.paused: dict[str, tuple[str, bool]] = {}
        """VM to the host that paused it, and whether that was reported as a fact."""
        self.facts: dict[str, str] = {}
        """VM to its state by the last fact, while no inventory has said anything newer."""

    def located(self) -> dict[str, tuple[str, m.VmRecord]]:
        found = {}
        for name in VMS:
            namers = self.namers(name)
            host = self.owner(name)
            if host in namers:
                found[name] = (host, namers[host])
        return found

    def namers(self, name: str) -> dict[str, m.VmRecord]:
        return {
            host: record
            for host, each in self.inventories.items()
            for record in each.vms
            if record.vm == name
        }

    def owner(self, name: str) -> str:
        if name in self.owners:
            return self.owners[name].host
        namers = self.namers(name)
        return next(iter(namers)) if len(namers) == 1 else ""

    def may_speak(self, host: str, name: str) -> bool:
        unknown = name not in self.owners and not self.namers(name)
        return unknown or self.owner(name) == host

    def take(self, message: Message) -> None:
        before = self.located()
        said_by = ""
        match message:
            case m.HostInventory():
                said_by = message.host
                self.inventories[message.host] = message
                self.hosts.add(message.host)
            case m.HostPresence():
                self.hosts.add(message.host)
                self.online[message.host] = message.online
                if message.online:
                    self.offline.discard(message.host)
                else:
                    self.offline.add(message.host)
            case m.VmOwner():
                self.owners[message.vm] = message
            case m.CoordinatorPresence():
                self.leads = "online" if message.online else "offline"
            case WholeRollout():
                self.rollouts[message.rollout] = message
            case m.VmFrozen():
                self.paused[message.vm] = message.host, True
                self.facts[message.vm] = "paused"
            case m.VmResumed():
                self.paused.pop(message.vm, None)
                self.facts[message.vm] = "running"
            case _:
                pass
        self._follow(before, said_by)

    def clear(self, topic: str) -> None:
        before = self.located()
        kind, name = topic.split("/")[2], topic.split("/")[3]
        gone = ""
        if topic.endswith("/inventory"):
            self.inventories.pop(name, None)
            gone = name
        elif kind == "host":
            self.online.pop(name, None)
            if name in self.hosts and name not in self.inventories:
                gone = name
        elif topic.endswith("/owner"):
            self.owners.pop(topic.split("/")[4], None)
        elif "/rollout/" in topic:
            self.rollouts.pop(topic.split("/")[4], None)
        elif topic.endswith("/coordinator"):
            self.leads = "unknown"
        if gone:
            self.hosts.discard(gone)
            self.offline.discard(gone)
        self._follow(before, "")
        for vm in [vm for vm, (host, _) in self.paused.items() if host == gone]:
            del self.paused[vm]

    def _follow(self, before: Mapping[str, tuple[str, m.VmRecord]], said_by: str) -> None:
        after = self.located()
        for vm in before.keys() - after.keys():
            self.paused.pop(vm, None)
            self.facts.pop(vm, None)
        for vm, (host, record) in after.items():
            moved = vm not in before or before[vm][0] != host
            if host != said_by and not moved:
                continue
            if record.state == "paused":
                self.paused.setdefault(vm, (host, False))
                self.facts.pop(vm, None)
            elif self.inventories[host].operation and self.paused.get(vm, ("", False))[1]:
                self.facts[vm] = "paused"
            else:
                self.paused.pop(vm, None)
                self.facts.pop(vm, None)

    def vms_by_state(self) -> dict[tuple[str, ...], float]:
        counts: Counter[tuple[str, ...]] = Counter()
        for vm, (_, record) in self.located().items():
            state = self.facts.get(vm, record.state)
            shown = "impaired" if state == "running" and record.state_detail else state
            counts[record.set, str(record.update_domain), shown] += 1
        return dict(counts)

    def under_way(self) -> set[str]:
        return {name for name, each in self.rollouts.items() if each.status not in OVER}


class Reader:
    """What a page does with changes."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"lanes": {}}
        self.revision = 0

    def apply(self, change: Delta) -> dict[str, Any]:
        said = msgspec.to_builtins(change)
        if said["whole"]:
            self.seen = {"lanes": {}}
        self.seen |= {
            part: said[part] for part in ("fleet", "rollouts", "paused") if said.get(part) is not None
        }
        self.seen["lanes"] |= {lane["lane"]: lane for lane in said.get("lanes", ())}
        self.revision = said["revision"]
        return self.seen


def check(exporter: Exporter, naive: Naive, reader: Reader) -> None:
    located = naive.located()
    assert exporter.vms_by_state() == naive.vms_by_state()
    assert set(exporter.fleet.hosts) == naive.hosts
    for host, each in exporter.fleet.hosts.items():
        said = naive.inventories.get(host)
        own = tuple(record for record in said.vms if located.get(record.vm) == (host, record)) if said else ()
        assert (each.inventory.vms if each.inventory is not None else ()) == own
        assert each.online == naive.online.get(host, False)
    for name in SETS:
        of_set = {located[vm][1].vm for vm in located if located[vm][1].set == name}
        assert exporter.fleet.census.sets.get(name, 0) == len(of_set)
    snapshot = exporter.live.snapshot(exporter.live.now)
    fleet = snapshot.fleet
    assert fleet is not None
    assert (fleet.hosts, fleet.vms, fleet.coordinator) == (len(naive.hosts), len(located), naive.leads)
    assert set(fleet.hosts_offline) == set(fleet.offline_since) == naive.offline
    paused = snapshot.paused or ()
    assert {each.vm: (each.host, each.since is not None) for each in paused} == naive.paused
    open_on = {labels[2] for labels in exporter.fleet.pauses.on_hosts(exporter.now_s)}
    assert open_on == {host for host, _ in naive.paused.values()}
    lasting = {(each.rule, each.about) for each in fleet.alarms if each.until is None}
    assert {vm for rule, vm in lasting if rule == "attention"} == {
        vm for vm, (_, record) in located.items() if record.state_detail
    }
    assert {vm for rule, vm in lasting if rule == "owner"} == {
        vm for vm, each in naive.owners.items() if each.contested_by
    }
    check_lanes(exporter, naive, snapshot)
    assert {each.rollout for each in snapshot.rollouts or ()} >= naive.under_way()
    # What changed since the last message adds up to the whole: nothing is drawn and not sent.
    changed = reader.apply(exporter.live.since(reader.revision, exporter.live.now))
    assert changed == Reader().apply(snapshot)


def check_lanes(exporter: Exporter, naive: Naive, snapshot: Delta) -> None:
    located = naive.located()
    lanes = {lane.lane: lane for lane in snapshot.lanes}
    assert snapshot.fleet is not None
    assert snapshot.fleet.sets == len({lane.set for lane in snapshot.lanes})
    assert snapshot.fleet.domains == sum(lane.key == "update_domain" for lane in snapshot.lanes)
    assert {f"{record.set}/ud/{record.update_domain}" for _, record in located.values()} <= lanes.keys()
    for lane in snapshot.lanes:
        mine = [record for _, record in located.values() if record.set == lane.set]
        assert lane.vms == sum(getattr(record, lane.key) == lane.domain for record in mine), lane.lane
        assert (lane.state == "frozen") == bool(lane.standing)
        kept = exporter.live._lanes.named(lane.lane)
        assert kept is not None
        assert {kept.rollout, (kept.waits or ("", 0))[0]} <= {"", *naive.under_way()}
    assert sum(lane.standing for lane in snapshot.lanes) == len(naive.paused)


records = st.builds(
    m.VmRecord,
    vm=st.sampled_from(VMS),
    set=st.sampled_from(SETS),
    update_domain=st.integers(0, 1),
    fault_domain=st.integers(0, 1),
    state=st.sampled_from(get_args(m.VmState)),
    state_detail=st.sampled_from(["", "its application has ended"]),
    agent=st.booleans(),
)
inventories = st.builds(
    m.HostInventory,
    host=st.sampled_from(HOSTS),
    driver=st.just("process"),
    epoch=st.just(1),
    vms=st.lists(records, max_size=4, unique_by=lambda record: record.vm).map(tuple),
    operation=st.sampled_from(["", OPERATION]),
)
of_pause: dict[str, Any] = {
    "vm": st.sampled_from(VMS),
    "host": st.sampled_from(HOSTS),
    "set": st.sampled_from(SETS),
    "update_domain": st.integers(0, 1),
    "operation": st.just(OPERATION),
    "method": st.just("freeze"),
    "budget_s": st.just(5.0),
    "at": st.just(AT),
}
frozen = st.builds(m.VmFrozen, **of_pause)
resumed = st.builds(
    m.VmResumed,
    **of_pause,
    pause_s=st.sampled_from([0.001, 1.0]),
    within_budget=st.just(True),
    resumed_by=st.just("updater"),
)
waves = st.lists(
    st.tuples(
        st.sampled_from(get_args(m.WaveStatus)),
        st.dictionaries(st.sampled_from(SETS), st.integers(0, 1), min_size=1),
    ),
    max_size=2,
)


@st.composite
def rollouts(draw: st.DrawFn) -> WholeRollout:
    number = draw(st.integers(0, 2))
    return whole_rollout(
        rollout=f"r{number}",
        update="u",
        status=draw(st.sampled_from(get_args(m.RolloutStatus))),
        policy=m.Policy(domain_key=draw(st.sampled_from(["update_domain", "fault_domain"]))),
        sets=(SETS[number % 2],) if number < 2 else SETS,
        waves=tuple(
            wave_state(wave=index, status=status, domains=domains, hosts=("h1",), vms=("a", "b"))
            for index, (status, domains) in enumerate(draw(waves))
        ),
        created_at=AT + timedelta(minutes=number),
    )


messages = st.one_of(
    inventories,
    inventories,
    frozen,
    resumed,
    rollouts(),
    st.builds(m.HostPresence, host=st.sampled_from(HOSTS), online=st.booleans(), instance=st.just("i")),
    st.builds(
        m.VmOwner,
        vm=st.sampled_from(VMS),
        host=st.sampled_from(("", *HOSTS)),
        epoch=st.just(1),
        contested_by=st.sampled_from([(), ("h9",)]),
    ),
    st.builds(m.CoordinatorPresence, coordinator=st.just("c"), epoch=st.just(1), online=st.booleans()),
    st.builds(
        m.WaveChanged,
        rollout=st.sampled_from(["r0", "r1", "r2"]),
        wave=st.integers(0, 1),
        status=st.sampled_from(get_args(m.WaveStatus)),
        domains=st.dictionaries(st.sampled_from(SETS), st.integers(0, 1), max_size=2),
        at=st.just(AT),
    ),
    st.sampled_from(
        [
            "",
            "caesura/v1/fleet/coordinator",
            *(f"caesura/v1/host/{host}/{word}" for host in HOSTS for word in ("inventory", "presence")),
            *(channel_of(m.VmOwner).topic(vm=vm) for vm in VMS),
            *(channel_of(m.RolloutState).topic(rollout=f"r{number}") for number in range(3)),
        ]
    ),
)


def has(host: str, state: m.VmState, operation: str = "", fault_domain: int = 0) -> m.HostInventory:
    record = m.VmRecord(vm="a", set="s1", update_domain=0, fault_domain=fault_domain, state=state)
    return m.HostInventory(host=host, driver="process", epoch=1, vms=(record,), operation=operation)


FROZEN = m.VmFrozen(
    vm="a", host="h1", set="s1", update_domain=0, operation=OPERATION, method="freeze", budget_s=5, at=AT
)
BY_FAULT = whole_rollout(
    rollout="r0",
    update="u",
    status="running",
    policy=m.Policy(domain_key="fault_domain"),
    sets=("s1",),
    waves=(wave_state(wave=0, status="started", domains={"s1": 0}, hosts=("h1",), vms=("a",)),),
    created_at=AT,
)


@settings(max_examples=250, deadline=None)
@given(st.lists(messages, min_size=1, max_size=20))
@example([FROZEN, has("h1", "paused", OPERATION), has("h1", "stopped", OPERATION), has("h1", "running")])
@example(
    [has("h1", "running"), has("h2", "paused"), *(m.VmOwner(vm="a", host=h, epoch=1) for h in HOSTS[:2])]
)
@example([has("h1", "running"), BY_FAULT, has("h1", "running", fault_domain=1)])
def test_after_every_message_they_show_what_a_rebuild_would(steps: list[Message | str]) -> None:
    exporter, naive, reader = Exporter(), Naive(), Reader()
    for step in steps:
        if step == "":
            exporter.expire()
        elif isinstance(step, str):
            exporter.clear(step)
            naive.clear(step)
        elif isinstance(step, m.VmFrozen | m.VmResumed) and not naive.may_speak(step.host, step.vm):
            assert not exporter.folded.state.ownership.may_speak(step.host, step.vm)
            continue
        else:
            exporter.take(step)
            naive.take(step)
        check(exporter, naive, reader)


def test_a_vm_that_is_frozen_again_elsewhere_is_paused_in_one_lane() -> None:
    """Its resume was missed, and it is in another domain now: the lane that it was in stayed frozen."""
    exporter = Exporter()
    for domain in (0, 1):
        exporter.take(
            m.VmFrozen(
                vm="a",
                host="h1",
                set="s1",
                update_domain=domain,
                operation=f"op{domain}",
                method="freeze",
                budget_s=5,
                at=AT,
            )
        )
    lanes = {lane.lane: (lane.state, lane.standing) for lane in exporter.live.snapshot(0).lanes}
    assert lanes == {"s1/ud/0": ("", 0), "s1/ud/1": ("frozen", 1)}


def test_a_rollout_that_is_under_way_is_known_though_many_are() -> None:
    """One for each set: the oldest ones had no series and no lane name, as soon as there were too many."""
    index = RolloutIndex()
    for number in range(ROLLOUTS_KEPT + 5):
        for status in ("running", "completed"):
            index.take(
                whole_rollout(
                    rollout=f"{status}-{number}",
                    update="u",
                    status=status,
                    policy=m.Policy(),
                    sets=(f"s{number}",),
                    waves=(),
                    created_at=AT + timedelta(minutes=number),
                )
            )
    assert {index.holder(f"s{number}") is not None for number in range(ROLLOUTS_KEPT + 5)} == {True}
    assert {each.status for each in index.known.values()} == {"running"}


# --- what a message costs ------------------------------------------------------------------------------------


def fleet_of(hosts: int) -> Exporter:
    """Hosts of four VMs, in one set of all and one of their own; a rollout is under way in each set, VMs of every host are paused."""
    exporter = Exporter()
    for number in range(hosts):
        vms = tuple(
            m.VmRecord(
                vm=f"v{number}-{each}",
                set="all" if each % 2 else f"s{number}",
                update_domain=each,
                state="paused" if each < 2 else "running",
                state_detail="" if each else "it is ill",
            )
            for each in range(4)
        )
        exporter.take(m.HostPresence(host=f"h{number}", online=True, instance="i"))
        exporter.take(m.HostInventory(host=f"h{number}", driver="process", epoch=1, vms=vms))
        exporter.take(rollout_of(number))
    return exporter


def rollout_of(number: int, status: m.RolloutStatus = "running") -> WholeRollout:
    wave = wave_state(
        wave=0, status="started", domains={f"s{number}": 0}, hosts=(f"h{number}",), vms=(f"v{number}-0",)
    )
    return whole_rollout(
        rollout=f"r{number}",
        update="u",
        status=status,
        policy=m.Policy(),
        sets=(f"s{number}",),
        waves=(wave,),
        created_at=AT,
    )


def steps_of(exporter: Exporter, message: Message | str) -> int:
    """Steps of the interpreter that the message causes, each turn of each loop among them: no clock is asked."""
    found = 0

    def count(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal found
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found += event == "opcode"
        return count

    gc.disable()  # others may have callbacks for it, which would be counted
    before = sys.gettrace()
    sys.settrace(count)
    try:
        if isinstance(message, str):
            exporter.clear(message)
        else:
            exporter.take(message)
    finally:
        sys.settrace(before)
        gc.enable()
    return found


RECORD = m.VmRecord(vm="v0-0", set="s0", update_domain=0, state="running", state_detail="it is ill")


@pytest.mark.parametrize(
    "message",
    [
        m.HostInventory(host="h0", driver="process", epoch=1, vms=(RECORD,)),
        m.HostPresence(host="h0", online=False, instance="i"),
        m.VmOwner(vm="v0-1", host="h1", epoch=1),
        m.VmFrozen(
            vm="v0-2",
            host="h0",
            set="s0",
            update_domain=2,
            operation="op1",
            method="freeze",
            budget_s=5,
            at=AT,
        ),
        rollout_of(0, "completed"),
        "caesura/v1/host/h0/inventory",
        "caesura/v1/fleet/rollout/r0",
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_message_costs_the_same_in_a_fleet_twenty_times_as_large(message: Message | str) -> None:
    """The end of a rollout looked at every lane, and an inventory at every alarm for each of its VMs."""
    assert steps_of(fleet_of(80), message) == steps_of(fleet_of(4), message)
