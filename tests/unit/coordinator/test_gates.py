"""The gates answer from what each set has in the way; here they are held to asking every host and VM, after every message."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.fleet.fold import apply
from caesura.fleet.retained_messages import Cleared
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS, missing
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.wave_gates import fence_blockers, health_blockers, placement_blockers

_HOSTS, _VMS, _SETS = ("h1", "h2", "h3"), ("a", "b", "c"), ("web", "db")
_WAVE = tuple(
    m.PlannedVm(vm=vm, set="web", update_domain=0, host=host, method="freeze", reason="", agent=vm != "c")
    for vm, host in zip(_VMS, _HOSTS, strict=True)
)
_DOMAINS = {"web": 0}
_KNOWN = ("h1", "h2", "h4")


def asked_of_everybody(fleet: FleetLookup, commanded: dict[str, str]) -> tuple[set[str], list[str], set[str]]:
    """Fence, health and placement by looking at the whole fleet: the hosts and VMs that are in the way."""
    records = {(host, vm.vm): vm for host, vm in fleet.snapshot().vms()}
    fence, health, moved = set[str](), [], set[str]()
    for host in {host for (host, _), vm in records.items() if vm.set in _DOMAINS} | set(_KNOWN):
        found = fleet.inventories.get(host)
        if (
            found is None
            or not fleet.is_online(host)
            or (found.epoch, found.coordinator) != (1, "c")
            or (found.operation or commanded.get(host)) not in {None, "", "own"}
            or found.guard == "absent"
            or missing(found.commands)
        ):
            fence.add(host)
        if found is not None and found.operation != "own":
            fence |= {host for vm in found.vms if vm.set in _DOMAINS and vm.state in {"paused", "unknown"}}
    for planned in _WAVE:
        record = records.get((planned.host, planned.vm))
        agent = fleet.state.agents_online.get(planned.vm, False) or not planned.agent
        well = record is not None and record.state == "running" and not record.state_detail
        if not (well and agent and fleet.is_online(planned.host)):
            health.append(planned.vm)
        place = (planned.set, planned.update_domain, planned.fault_domain)
        if record is not None and (record.set, record.update_domain, record.fault_domain) != place:
            moved.add(planned.vm)
    return fence, health, moved


_RECORDS = st.builds(
    lambda vm, changes: m.VmRecord(
        **{"vm": vm, "set": "web", "update_domain": 0, "state": "running"} | changes
    ),
    st.sampled_from(_VMS),
    st.fixed_dictionaries(
        {},
        optional={
            "set": st.sampled_from(_SETS),
            "update_domain": st.integers(0, 1),
            "fault_domain": st.integers(0, 1),
            "state": st.sampled_from(["paused", "stopped", "unknown"]),
            "state_detail": st.just("by hand"),
            "agent": st.booleans(),
        },
    ),
)
_CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "epoch": st.integers(0, 2),
    "coordinator": st.sampled_from(["c", "d"]),
    "operation": st.sampled_from(["own", "another"]),
    "guard": st.just("absent"),
    "commands": st.just(()),
}
_INVENTORIES = st.builds(
    lambda host, vms, changes: m.HostInventory(
        **{
            "host": host,
            "driver": "p",
            "epoch": 1,
            "coordinator": "c",
            "vms": tuple(vms),
            "guard": "ready",
            "commands": COMMANDS,
        }
        | changes
    ),
    st.sampled_from(_HOSTS),
    st.lists(_RECORDS, max_size=3, unique_by=lambda each: each.vm),
    st.fixed_dictionaries({}, optional=_CHANGES),
)
_MESSAGES = st.one_of(
    _INVENTORIES,
    st.builds(
        lambda host, on: m.HostPresence(host=host, online=on, instance="i"),
        st.sampled_from(_HOSTS),
        st.booleans(),
    ),
    st.builds(
        lambda vm, on: m.AgentPresence(vm=vm, online=on, boot_id="b"), st.sampled_from(_VMS), st.booleans()
    ),
    st.builds(
        lambda vm, host: m.VmOwner(vm=vm, host=host, epoch=1), st.sampled_from(_VMS), st.sampled_from(_HOSTS)
    ),
    st.builds(lambda host: Cleared(m.HostInventory, {"host": host}), st.sampled_from(_HOSTS)),
)


def _well() -> FleetState:
    """Everything as the wave has it, and nothing in the way but a host that is gone."""
    state = FleetState()
    for vm in _WAVE:
        record = m.VmRecord(vm=vm.vm, set="web", update_domain=0, state="running", agent=vm.agent)
        inventory = m.HostInventory(
            host=vm.host,
            driver="p",
            epoch=1,
            coordinator="c",
            vms=(record,),
            guard="ready",
            commands=COMMANDS,
        )
        presence = m.HostPresence(host=vm.host, online=True, instance="i")
        for message in (inventory, presence, m.AgentPresence(vm=vm.vm, online=True, boot_id="b")):
            apply(state, message, 0.0)
    return state


@settings(max_examples=400, deadline=None)
@given(
    st.lists(_MESSAGES, max_size=10),
    st.dictionaries(st.sampled_from((*_HOSTS, "h4")), st.sampled_from(["own", "another"])),
)
def test_the_gates_are_what_asking_everybody_says(
    messages: list[Message | Cleared], commanded: dict[str, str]
) -> None:
    state = _well()
    fleet = FleetLookup(
        state, commanded=lambda: commanded
    )  # one view over all of it: what it remembers must not grow stale
    for message in (None, *messages):
        if message is not None:
            apply(state, message, 0.0)
        fence, health, moved = asked_of_everybody(fleet, commanded)
        blockers = fence_blockers(fleet, _DOMAINS, _KNOWN, epoch=1, coordinator="c", own={"own"})
        named = {host for host in (*_HOSTS, "h4") if any(host in each.text for each in blockers)}
        assert named == fence
        assert [each.text.split()[0].rstrip(":") for each in health_blockers(fleet, _WAVE)] == health
        assert {each.text.split()[0] for each in placement_blockers(fleet, _WAVE)} == moved


def test_a_vm_that_moves_while_its_wave_waits_is_found() -> None:
    state = _well()
    fleet = FleetLookup(state)
    assert not placement_blockers(fleet, _WAVE)
    before = state.inventories["h2"]
    moved = tuple(msgspec.structs.replace(vm, update_domain=1) for vm in before.vms)
    apply(state, msgspec.structs.replace(before, vms=moved), 0.0)
    (why,) = placement_blockers(fleet, _WAVE)
    assert why.code == "vm_moved"
    assert why.text.startswith("b is in set web update domain 1")
