"""The fold of the bus: after every message it equals what a naive rebuild makes of the raw words, and costs what the message carries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.topics import CHANNELS
from caesura.fleet.fold import NOTHING, apply
from caesura.fleet.retained_messages import TOMBSTONES_KEPT, Cleared, RetainedMessages, retained_channel
from caesura.fleet.state import FleetState, LocatedVm
from caesura.lifecycle.command_compatibility import COMMANDS, missing

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)
_HOSTS = ("h1", "h2", "h3")
_VMS = ("a", "b", "c", "d")
_SETS = ("web", "db")


def vm(name: str, set_name: str = "web", domain: int = 0, **changes: Any) -> m.VmRecord:
    values: dict[str, Any] = {"vm": name, "set": set_name, "update_domain": domain, "state": "running"}
    return m.VmRecord(**values | changes)


def inventory(host: str, *vms: m.VmRecord, **changes: Any) -> m.HostInventory:
    values: dict[str, Any] = {
        "host": host,
        "driver": "process",
        "epoch": 1,
        "coordinator": "c",
        "vms": vms,
        "guard": "ready",
        "commands": COMMANDS,
    }
    return m.HostInventory(**values | changes)


def present(host: str, *, online: bool = True) -> m.HostPresence:
    return m.HostPresence(host=host, online=online, instance="i")


def agent(name: str, *, online: bool = True) -> m.AgentPresence:
    return m.AgentPresence(vm=name, online=online, boot_id="b")


def owner(name: str, host: str, epoch: int = 1) -> m.VmOwner:
    return m.VmOwner(vm=name, host=host, epoch=epoch)


def document(name: str, incarnation: int) -> m.SetDocument:
    return m.SetDocument(set=name, incarnation=incarnation, events=())


def fold(*messages: Message | Cleared) -> FleetState:
    state = FleetState()
    for each in messages:
        state, _ = apply(state, each, 0.0)
    return state


# --- the naive rebuild -------------------------------------------------------------------------------------


def naive_words(  # noqa: PLR0912 - one rule after the other, as they are written down
    messages: Iterable[Message | Cleared],
) -> tuple[dict[tuple[type[Message], tuple[str, ...]], Message | None], m.CoordinatorPresence | None]:
    """The last word on each topic and who leads, by the rules as they are written down."""
    words: dict[tuple[type[Message], tuple[str, ...]], Message | None] = {}
    shown: dict[str, int] = {}
    leader: m.CoordinatorPresence | None = None
    for each in messages:
        match each:
            case Cleared(kind=kind, parameters=parameters):
                words[kind, tuple(parameters.values())] = None
                leader = None if kind is m.CoordinatorPresence else leader
                continue
            case m.HostInventory() | m.HostPresence():
                key: tuple[str, ...] = (each.host,)
            case m.AgentPresence() | m.VmOwner():
                key = (each.vm,)
            case m.SetDocument():
                key = (each.set,)
            case m.CoordinatorPresence():
                key = ()
            case _:
                raise AssertionError(each)
        known = words.get((type(each), key))
        if isinstance(each, m.SetDocument):
            least = shown.get(each.set, 0) + (known is not None)
            if each.incarnation < least:
                continue
            shown[each.set] = each.incarnation
        leads = leader.epoch if leader is not None else None
        older = isinstance(each, m.VmOwner) and isinstance(known, m.VmOwner) and each.epoch < known.epoch
        if older and isinstance(known, m.VmOwner) and leads is not None and known.epoch <= leads:
            continue
        if isinstance(each, m.CoordinatorPresence):
            goodbye = isinstance(known, m.CoordinatorPresence) and not known.online
            if leader is not None and each.epoch < leader.epoch and not (each.online and goodbye):
                if each.epoch == 0 and not each.online:
                    leader = m.CoordinatorPresence(
                        coordinator=leader.coordinator, epoch=leader.epoch, online=False
                    )
                continue
            leader = each
        words[type(each), key] = each
    return words, leader


def naive_located(words: Mapping[Any, Message | None]) -> dict[str, LocatedVm]:
    """Every VM that belongs to a host which names it: by its record, else to the only host that does."""
    inventories = [each for each in words.values() if isinstance(each, m.HostInventory)]
    records = {each.vm: each.host for each in words.values() if isinstance(each, m.VmOwner)}
    found = {}
    for name in _VMS:
        namers = {each.host: record for each in inventories for record in each.vms if record.vm == name}
        belongs = records.get(name, next(iter(namers)) if len(namers) == 1 else "")
        if belongs in namers:
            found[name] = LocatedVm(belongs, namers[belongs])
    return found


def check(state: FleetState, messages: list[Message | Cleared]) -> None:
    words, leader = naive_words(messages)
    assert state.coordinator == leader
    for (kind, key), word in words.items():
        assert state.words.get(kind, *key) == word
    located = naive_located(words)
    inventories = {each.host: each for each in words.values() if isinstance(each, m.HostInventory)}
    online = {each.host for each in words.values() if isinstance(each, m.HostPresence) and each.online}
    agents = {each.vm for each in words.values() if isinstance(each, m.AgentPresence) and each.online}
    assert {name: state.vm(name) for name in _VMS} == {name: located.get(name) for name in _VMS}
    assert {host for host in _HOSTS if state.is_online(host)} == online
    assert {host: state.inventory(host) for host in state.inventories} == {
        host: m.HostInventory(
            **{name: getattr(each, name) for name in each.__struct_fields__}
            | {
                "vms": tuple(
                    record for record in each.vms if located.get(record.vm) == LocatedVm(host, record)
                )
            }
        )
        for host, each in inventories.items()
    }
    assert set(state.sets()) == {each.record.set for each in located.values()}
    for name in _SETS:
        index = state.set_index(name)
        mine = {key: each for key, each in located.items() if each.record.set == name}
        hosts = {each.host for each in mine.values()}
        obeyed = {host: (inventories[host].epoch, inventories[host].coordinator) for host in hosts}
        assert index.vms == {key: each.host for key, each in mine.items()}
        assert index.domains == {
            domain: {key for key, each in mine.items() if each.record.update_domain == domain}
            for domain in {each.record.update_domain for each in mine.values()}
        }
        assert index.hosts == obeyed
        for epoch in (1, 2, 3):
            assert index.not_obeying((epoch, "c")) == {host for host in hosts if obeyed[host] != (epoch, "c")}
        assert index.offline == hosts - online
        assert index.unguarded == {host for host in hosts if inventories[host].guard == "absent"}
        assert index.outdated == {host for host in hosts if missing(inventories[host].commands)}
        assert index.busy == {
            host: inventories[host].operation for host in hosts if inventories[host].operation
        }
        assert index.held == {k for k, each in mine.items() if each.record.state in {"paused", "unknown"}}
        assert index.not_running == {k for k, each in mine.items() if each.record.state != "running"}
        assert index.unwell == {k for k, each in mine.items() if each.record.state_detail}
        assert index.agent_offline == {k for k, e in mine.items() if e.record.agent and k not in agents}


_RECORDS = st.builds(
    vm,
    st.sampled_from(_VMS),
    st.sampled_from(_SETS),
    st.integers(0, 1),
    state=st.sampled_from(["running", "paused", "stopped", "unknown"]),
    state_detail=st.sampled_from(["", "by hand"]),
    agent=st.booleans(),
)
_INVENTORIES = st.builds(
    lambda host, records, changes: inventory(host, *records, **changes),
    st.sampled_from(_HOSTS),
    st.lists(_RECORDS, max_size=4, unique_by=lambda each: each.vm),
    st.fixed_dictionaries(
        {},
        optional={
            "epoch": st.integers(1, 3),
            "operation": st.sampled_from(["", "o1"]),
            "guard": st.sampled_from(["ready", "absent"]),
            "commands": st.sampled_from([(), COMMANDS]),
        },
    ),
)
_CLEARED = st.one_of(
    st.builds(lambda host: Cleared(m.HostInventory, {"host": host}), st.sampled_from(_HOSTS)),
    st.builds(lambda host: Cleared(m.HostPresence, {"host": host}), st.sampled_from(_HOSTS)),
    st.builds(lambda name: Cleared(m.AgentPresence, {"vm": name}), st.sampled_from(_VMS)),
    st.builds(lambda name: Cleared(m.VmOwner, {"vm": name}), st.sampled_from(_VMS)),
    st.builds(lambda name: Cleared(m.SetDocument, {"set": name}), st.sampled_from(_SETS)),
    st.just(Cleared(m.CoordinatorPresence, {})),
)
_MESSAGES = st.one_of(
    _INVENTORIES,
    _INVENTORIES,
    st.builds(lambda host, on: present(host, online=on), st.sampled_from(_HOSTS), st.booleans()),
    st.builds(lambda name, on: agent(name, online=on), st.sampled_from(_VMS), st.booleans()),
    st.builds(owner, st.sampled_from(_VMS), st.sampled_from(("", *_HOSTS)), st.integers(1, 3)),
    st.builds(document, st.sampled_from(_SETS), st.integers(0, 3)),
    st.builds(
        lambda epoch, on: m.CoordinatorPresence(coordinator="c", epoch=epoch, online=on),
        st.integers(0, 3),
        st.booleans(),
    ),
    _CLEARED,
)


@settings(max_examples=300)
@given(st.lists(_MESSAGES, max_size=20))
def test_after_every_message_it_is_what_a_rebuild_makes_of_the_words(
    messages: list[Message | Cleared],
) -> None:
    state = FleetState()
    for count, each in enumerate(messages, 1):
        before = {name: state.vm(name) for name in _VMS}
        online = {name: state.agents_online.get(name) for name in _VMS}
        known = {host: (state.inventory(host), state.is_online(host)) for host in _HOSTS}
        state, changes = apply(state, each, float(count))
        check(state, messages[:count])
        # Changes name all that differs: a view that looks at nothing else again misses nothing.
        moved = {name for name in _VMS if before[name] != state.vm(name)}
        agents = {name for name in _VMS if online[name] != state.agents_online.get(name)}
        assert moved | agents == changes.vms
        assert changes.before == {name: there for name in moved if (there := before[name]) is not None}
        heads = {
            host
            for host in _HOSTS
            if _head(*known[host]) != _head(state.inventory(host), state.is_online(host))
        }
        assert heads <= changes.hosts
        touched = {
            located.record.set for name in moved for located in (before[name], state.vm(name)) if located
        }
        assert touched <= changes.sets
        theirs = {located.host for name in moved for located in (before[name], state.vm(name)) if located}
        assert theirs == changes.owners


def _head(known: m.HostInventory | None, online: bool) -> Any:
    return online, known and (known.epoch, known.coordinator, known.operation, known.guard, known.commands)


@given(st.lists(_MESSAGES, max_size=12))
def test_a_repetition_changes_nothing(messages: list[Message | Cleared]) -> None:
    state = FleetState()
    for each in messages:
        apply(state, each, 0.0)
        _, changes = apply(state, each, 1.0)
        assert changes == NOTHING


# --- what is decided once ------------------------------------------------------------------------------------


def test_facts_before_the_inventory_count_when_it_comes() -> None:
    state = fold(present("h1"), agent("a"), owner("a", "h1"))
    assert state.vm("a") is None
    state, changes = apply(state, inventory("h1", vm("a")), 0.0)
    assert changes.vms == {"a"}
    assert not state.set_index("web").offline
    assert not state.set_index("web").agent_offline


def test_a_document_that_was_removed_leaves_its_incarnation() -> None:
    state = fold(document("web", 7), Cleared(m.SetDocument, {"set": "web"}))
    assert state.words.get(m.SetDocument, "web") is None
    apply(state, document("web", 6), 0.0)
    assert state.words.get(m.SetDocument, "web") is None
    apply(state, document("web", 7), 0.0)
    assert state.words.get(m.SetDocument, "web") == document("web", 7)


def test_a_record_of_an_older_epoch_changes_nothing_until_the_record_is_removed() -> None:
    leader = m.CoordinatorPresence(coordinator="c", epoch=5, online=True)
    named = inventory("h1", vm("a")), inventory("h2", vm("a"))
    state = fold(leader, *named, owner("a", "h1", 5), owner("a", "h2", 4))
    assert state.ownership.owner_of("a") == "h1"
    apply(state, Cleared(m.VmOwner, {"vm": "a"}), 0.0)
    assert state.ownership.owner_of("a") == ""
    apply(state, owner("a", "h2", 4), 0.0)
    assert state.ownership.owner_of("a") == "h2"


def test_a_lower_epoch_begins_when_the_operator_had_the_higher_one_forgotten() -> None:
    """Nobody had claimed it: were it to count for good, no view would believe a record again before its restart."""

    def said(epoch: int, *, online: bool) -> m.CoordinatorPresence:
        return m.CoordinatorPresence(coordinator="c", epoch=epoch, online=online)

    high = 2**50
    state = fold(
        inventory("h1", vm("a")), inventory("h2", vm("a")), said(high, online=True), owner("a", "h1", high)
    )
    apply(state, said(7, online=True), 0.0)
    assert state.leader_epoch == high, "one of an older epoch that wakes up leads nobody"
    apply(state, owner("a", "h2", 7), 0.0)
    assert state.ownership.owner_of("a") == "h1"
    apply(state, said(0, online=False), 0.0)
    apply(state, said(7, online=True), 0.0)
    assert state.leader_epoch == high, "nor when the broker says that the other one is gone"
    apply(state, said(high, online=False), 0.0)
    apply(state, said(7, online=True), 0.0)
    apply(state, owner("a", "h2", 7), 0.0)
    assert state.leader_epoch == 7
    assert state.ownership.owner_of("a") == "h2"


def test_the_last_will_of_a_coordinator_has_no_epoch_and_counts() -> None:
    def said(epoch: int, *, online: bool, name: str = "c") -> m.CoordinatorPresence:
        return m.CoordinatorPresence(coordinator=name, epoch=epoch, online=online)

    state = fold(said(5, online=True), said(0, online=False))
    assert state.coordinator == said(5, online=False)
    apply(state, said(5, online=True), 0.0)
    assert state.coordinator == said(5, online=True), "it is back, and says what it said before"
    apply(state, said(0, online=False), 0.0)
    apply(state, said(6, online=True, name="d"), 0.0)
    apply(state, said(5, online=False), 0.0)
    assert state.coordinator == said(6, online=True, name="d")


def test_every_retained_message_is_kept_by_its_topic() -> None:
    """A retained message whose topic does not follow from its body would be dropped without a word."""
    kept = {each.message for each in CHANNELS if retained_channel(each.message) is not None}
    assert kept == {each.message for each in CHANNELS if each.retain}
    assert m.VmFrozen not in kept


def test_removed_topics_are_remembered_within_bounds_and_documents_always() -> None:
    words = RetainedMessages()
    words.put(document("web", 9), 0.0)
    words.clear(m.SetDocument, {"set": "web"}, 0.0)
    for number in range(TOMBSTONES_KEPT + 5):
        words.clear(m.AgentPresence, {"vm": f"v{number}"}, 0.0)
    kept = words._words[m.AgentPresence].values()
    assert [word.message for word in kept] == [None] * TOMBSTONES_KEPT
    assert words.put(document("web", 8), 0.0) == "refused"


# --- what a message costs ------------------------------------------------------------------------------------


def _calls(state: FleetState, message: Message | Cleared) -> tuple[int, int]:
    """Index entries that were touched, and calls of any function: no clock is asked."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    before = state.touched
    gc.disable()  # others may have callbacks for it, which would be counted
    sys.setprofile(count)
    try:
        apply(state, message, 1.0)
    finally:
        sys.setprofile(None)
        gc.enable()
    return state.touched - before, calls


def _fleet(hosts: int) -> FleetState:
    """Hosts of four VMs in two sets each; every other VM of a host is in the set of all of them."""
    state = FleetState()
    for number in range(hosts):
        host = f"h{number}"
        records = [vm(f"v{number}-{each}", "all" if each % 2 else f"s{number}") for each in range(4)]
        apply(state, present(host), 0.0)
        apply(state, inventory(host, *records), 0.0)
        for record in records:
            apply(state, owner(record.vm, host), 0.0)
            apply(state, agent(record.vm), 0.0)
    return state


@pytest.mark.parametrize(
    "message",
    [
        inventory(
            "h0", *(vm(f"v0-{each}", "all" if each % 2 else "s0", state="paused") for each in range(4))
        ),
        inventory("h0", vm("v0-0", "all", 3), vm("v0-1", "all"), vm("new", "all"), epoch=2),
        present("h0", online=False),
        agent("v0-1", online=False),
        owner("v0-1", "h1", 2),
        document("all", 4),
        Cleared(m.HostInventory, {"host": "h0"}),
        Cleared(m.VmOwner, {"vm": "v0-1"}),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_message_costs_the_same_in_a_fleet_a_hundred_times_as_large(message: Message | Cleared) -> None:
    small, large = _fleet(4), _fleet(400)
    assert _calls(large, message) == _calls(small, message)
