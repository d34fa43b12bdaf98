"""Plans: which VMs go together, with which method and why, and what is refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.fleet.fold import apply
from caesura.fleet.state import FleetState
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.fleet_snapshot import Contested, FleetSnapshot
from caesura_coordinator.plan import make_plan
from caesura_coordinator.plan_kernel import RETURN_S
from caesura_coordinator.wave_gates import health_blockers
from caesura_testing.refold import refold

Build = Callable[..., m.VmRecord]
Host = Callable[..., m.HostInventory]
MakeFleet = Callable[..., FleetLookup]


def _plan(
    fleet: FleetLookup | FleetSnapshot,
    update: str = "patch",
    selection: m.Selection | None = None,
    **policy: object,
) -> m.Plan:
    return make_plan(
        fleet if isinstance(fleet, FleetSnapshot) else fleet.snapshot(),
        update=update,
        selection=selection or m.Selection(),
        policy=m.Policy(**policy),  # type: ignore[arg-type]
    )


def _reasons(plan: m.Plan) -> dict[str, str]:
    return {each.subject: each.reason for each in plan.refusals}


def test_hosts_of_one_domain_share_a_wave_and_domains_follow_in_order(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(
        fleet(
            host("h3", build("w3", domain=1), build("d3", "db", 1)),
            host("h1", build("w1"), build("d1", "db")),
            host("h2", build("w2"), build("d2", "db")),
        )
    )
    assert [wave.hosts for wave in plan.waves] == [("h1", "h2"), ("h3",)]
    assert [wave.domains for wave in plan.waves] == [{"web": 0, "db": 0}, {"web": 1, "db": 1}]
    assert not plan.refusals


def test_every_vm_of_a_host_is_in_a_host_scope_plan_though_only_its_neighbour_was_selected(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(host("h1", build("w1"), build("d1", "db"))), selection=m.Selection(sets=("web",)))
    assert {vm.vm for wave in plan.waves for vm in wave.vms} == {"w1", "d1"}
    assert all(vm.method == "freeze" and "host" in vm.reason for wave in plan.waves for vm in wave.vms)


def test_a_host_with_two_domains_of_one_set_is_refused_by_name(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(host("h1", build("w1", domain=0), build("w2", domain=1))))
    assert plan.waves == ()
    assert "2 domains" in _reasons(plan)["h1"]
    assert "w1" in _reasons(plan)["h1"]
    assert "w2" in _reasons(plan)["h1"]


def test_fault_domains_can_be_the_key(build: Build, host: Host, fleet: MakeFleet) -> None:
    split = fleet(host("h1", build("w1", domain=0), build("w2", domain=1)))
    plan = _plan(split, domain_key="fault_domain")
    assert len(plan.waves) == 1


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"guard": "absent"}, "h1", "pause guard"),
        ({"updates": ()}, "patch", "no host defines"),
    ],
)
def test_what_a_host_lacks_refuses_the_plan(
    change: dict[str, object], subject: str, words: str, build: Build, host: Host, fleet: MakeFleet
) -> None:
    assert words in _reasons(_plan(fleet(host("h1", build("w1"), **change))))[subject]


def test_an_offline_host_is_refused_by_name(build: Build, host: Host, fleet: MakeFleet) -> None:
    assert "offline" in _reasons(_plan(fleet(host("h1", build("w1")), offline=("h1",))))["h1"]


@pytest.mark.parametrize(
    "selection", [m.Selection(sets=("web",)), m.Selection(hosts=("h1",))], ids=["set", "host"]
)
@pytest.mark.parametrize(
    ("change", "words"),
    [({}, "its host updater is offline"), ({"guard": "absent"}, "it has no pause guard")],
)
def test_a_host_that_the_fence_will_ask_refuses_the_plan_however_the_others_were_selected(
    change: dict[str, object],
    words: str,
    selection: m.Selection,
    build: Build,
    host: Host,
    fleet: MakeFleet,
) -> None:
    one, other = host("h1", build("w1")), host("h2", build("w2", update_domain=1), **change)
    plan = _plan(fleet(one, other, offline=() if change else ("h2",)), selection=selection)
    assert words in _reasons(plan)["h2"]
    assert not plan.waves


def test_an_offline_host_of_another_set_is_in_nobodys_way(build: Build, host: Host, fleet: MakeFleet) -> None:
    other = host("h2", build("w2", set="db"))
    plan = _plan(fleet(host("h1", build("w1")), other, offline=("h2",)), selection=m.Selection(hosts=("h1",)))
    assert not plan.refusals
    assert plan.waves


def test_unknown_names_are_refused_with_the_nearest_known_one(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    one = fleet(host("h1", build("w1")))
    assert "'web'" in _reasons(_plan(one, selection=m.Selection(sets=("wbe",))))["wbe"]
    assert "'patch'" in _reasons(_plan(one, "pach"))["pach"]
    assert (
        "no host of this name" in _reasons(_plan(one, selection=m.Selection(hosts=("nowhere",))))["nowhere"]
    )


def test_many_unknown_names_are_refused_at_once(
    build: Build, host: Host, fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search among all names costs a tenth of a second in a large fleet, and a request has room for thousands of names."""
    searched: list[str] = []

    def search(name: str, *_: Any, **__: Any) -> list[str]:
        searched.append(name)
        return []

    monkeypatch.setattr(difflib, "get_close_matches", search)
    names = tuple(f"old-{number}" for number in range(500))
    refusals = _plan(fleet(host("h1", build("w1"))), selection=m.Selection(vms=names)).refusals
    assert len(searched) <= 5
    assert len(refusals) <= 25
    assert refusals[-1].reason.endswith("nor of 479 more of those that were given")


def test_a_vm_that_two_hosts_name_is_left_out_by_name_and_nothing_else_is(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """What counts of an inventory is the host's own VMs; a VM of nobody is in none."""
    guest = m.UpdateRecord(update="guest", impact="pause", scope="vm", expected_s=1, timeout_s=5)
    patch = host("h1").updates[0]
    updates = (patch, guest)
    one = fleet(host("h1", build("w1"), build("w2"), updates=updates), host("h2", updates=updates))
    contested = one.snapshot(
        {
            "w1": Contested(record=build("w1"), host="h1", reason="w1 is h1's"),
            "w9": Contested(record=build("w9"), host="h2", reason="w9 is nobody's"),
        }
    )
    by_vm, by_host = _plan(contested, "guest"), _plan(contested, "patch")
    assert not by_vm.refusals
    assert [each.vm for wave in by_vm.waves for each in wave.vms] == ["w2"]
    assert {each.vm: each.reason for each in by_vm.skipped} == {"w1": "w1 is h1's", "w9": "w9 is nobody's"}
    # Nobody else's word keeps a host from its update: its pause cannot leave a VM out.
    assert [each.vm for wave in by_host.waves for each in wave.vms] == ["w1", "w2"]
    assert {each.vm for each in by_host.skipped} == {"w9"}
    for name in ("w1", "w9"):
        assert name in _reasons(_plan(contested, "guest", selection=m.Selection(vms=(name,))))[name]


def test_a_plan_is_of_the_moment_of_its_snapshot(build: Build, host: Host, fleet: MakeFleet) -> None:
    """It is made in a thread, while hosts come and go: neither their VMs nor whether they are on the bus may change under it."""
    one = fleet(host("h1", build("w1"), build("d1", "db")), host("h2", build("w2", domain=1)))
    taken, before = one.snapshot(), _plan(one)
    apply(one.state, host("h1", build("w1", "other"), build("w3")), 0.0)
    apply(one.state, m.HostPresence(host="h2", online=False, instance="i"), 0.0)
    apply(one.state, host("h9", build("w9")), 0.0)
    assert _plan(one) != before
    assert _plan(taken) == before
    assert taken.hosts_of(["web", "db"]) == {"h1", "h2"}
    assert {*taken.vm_names()} == {"w1", "d1", "w2"}


@given(st.data())
def test_a_snapshot_answers_as_the_fleet_that_it_is_of(data: st.DataObject) -> None:
    """Whatever hosts report, two that name the same VM included."""
    names, hosts, sets = ("w1", "w2", "w3"), ("h1", "h2", "h3"), ("web", "db")
    vms = st.builds(
        lambda vm, group: m.VmRecord(vm=vm, set=group, update_domain=0, state="running"),
        st.sampled_from(names),
        st.sampled_from(sets),
    )
    inventories = st.builds(
        lambda name, found: m.HostInventory(
            host=name, driver="process", epoch=1, vms=tuple({vm.vm: vm for vm in found}.values())
        ),
        st.sampled_from(hosts),
        st.lists(vms, max_size=3),
    )
    presences = st.builds(
        lambda name, online: m.HostPresence(host=name, online=online, instance="i"),
        st.sampled_from(hosts),
        st.booleans(),
    )
    owners = st.builds(
        lambda vm, name: m.VmOwner(vm=vm, host=name, epoch=1), st.sampled_from(names), st.sampled_from(hosts)
    )
    state = FleetState()
    for message in data.draw(st.lists(st.one_of(inventories, presences, owners), max_size=12)):
        apply(state, message, 0.0)
    lookup = FleetLookup(state)
    taken = lookup.snapshot()
    assert dict(taken.inventories) == dict(lookup.inventories)
    assert {*taken.sets()} == {*state.sets()}
    assert {*taken.vm_names()} == {*lookup.vm_names()}
    for name in names:
        assert taken.vm(name) == lookup.vm(name)
    for name in sets:
        assert taken.hosts_of([name]) == lookup.hosts_of([name])
    for name in hosts:
        # Of a host without an inventory no plan asks.
        assert taken.is_online(name) == (lookup.is_online(name) and name in lookup.inventories)


def test_an_update_that_differs_between_hosts_is_refused(build: Build, host: Host, fleet: MakeFleet) -> None:
    other = m.UpdateRecord(
        update="patch", version="2", impact="pause", scope="host", expected_s=2, timeout_s=9
    )
    plan = _plan(fleet(host("h1", build("w1")), host("h2", build("w2"), updates=(other,))))
    assert "otherwise than h1" in _reasons(plan)["h2"]


def test_the_slowest_host_says_how_long_an_update_takes(build: Build, host: Host, fleet: MakeFleet) -> None:
    """Else it is refused by that host in the middle of the rollout, or given up for lost while it still works."""

    def patch(expected_s: float, timeout_s: float, **changes: object) -> m.UpdateRecord:
        values: dict[str, object] = {"update": "patch", "impact": "pause", "scope": "vm", **changes}
        return m.UpdateRecord(expected_s=expected_s, timeout_s=timeout_s, **values)  # type: ignore[arg-type]

    def both(**changes: object) -> FleetLookup:
        swap = ("freeze", "swap")
        return fleet(
            host("h1", build("w1", methods=swap), updates=(patch(1, 9, **changes),)),
            host("h2", build("w2", methods=swap), updates=(patch(40, 300, **changes),)),
        )

    assert "takes 40 s" in _reasons(_plan(both()))["patch"]
    assert _plan(both(vmm="beside")).outside_pause_s == 300 + 60
    assert _plan(both(), selection=m.Selection(hosts=("h1",))).expected_pause_s == 1, "h2 has no part in it"


def test_an_update_longer_than_the_budget_is_refused(build: Build, host: Host, fleet: MakeFleet) -> None:
    assert "budget" in _reasons(_plan(fleet(host("h1", build("w1"))), budget_s=2.0))["patch"]


def test_a_reboot_needs_permission_and_a_driver_that_can(build: Build, host: Host, fleet: MakeFleet) -> None:
    kernel = m.UpdateRecord(update="kernel", impact="reboot", scope="host", expected_s=60, timeout_s=600)
    one = fleet(host("h1", build("w1"), updates=(kernel,)))
    assert "--allow-reboot" in _reasons(_plan(one, "kernel"))["kernel"]
    assert _reasons(_plan(one, "kernel", allow_reboot=True))["w1"] == "cannot reboot: cannot reboot"


def test_a_reboot_is_given_the_time_of_the_slowest_host_and_no_pause(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    def kernel(shutdown_s: float) -> m.UpdateRecord:
        return m.UpdateRecord(
            update="kernel",
            impact="reboot",
            scope="host",
            expected_s=60,
            timeout_s=600,
            shutdown_s=shutdown_s,
        )

    able = {"methods": ("live", "reboot"), "methods_missing": {}}
    both = fleet(
        host("h1", build("w1", **able), updates=(kernel(30),)),
        host("h2", build("w2", update_domain=1, **able), updates=(kernel(200),)),
    )
    # Neither the budget nor a proof of memory matters to an update that loses memory.
    plan = _plan(both, "kernel", allow_reboot=True, budget_s=1.0, on_unproven="halt")
    assert plan.refusals == ()
    assert (plan.event_type, plan.expected_pause_s) == ("Reboot", 0)
    assert plan.outside_pause_s == 200 + 600 + 90
    assert {vm.method for wave in plan.waves for vm in wave.vms} == {"reboot"}


def test_that_vms_may_be_killed_is_said_in_the_plan_whichever_host_does_it(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    def kernel(**more: Any) -> m.UpdateRecord:
        return m.UpdateRecord(
            update="kernel", impact="reboot", scope="host", expected_s=60, timeout_s=600, **more
        )

    able = {"methods": ("live", "reboot"), "methods_missing": {}}
    both = fleet(
        host("h1", build("w1", **able), updates=(kernel(),)),
        host(
            "h2",
            build("w2", update_domain=1, **able),
            updates=(kernel(kill_after_timeout=True, shutdown_s=30),),
        ),
    )
    plan = _plan(both, "kernel", allow_reboot=True)
    says = "the update needs a reboot; a VM that does not shut down within 120 s is killed"
    assert {vm.reason for wave in plan.waves for vm in wave.vms} == {says}
    gentle = fleet(host("h1", build("w1", **able), updates=(kernel(),)))
    (vm,) = _plan(gentle, "kernel", allow_reboot=True).waves[0].vms
    assert vm.reason == "the update needs a reboot"


def test_what_could_end_a_vm_in_its_pause_is_said_in_the_plan(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    kernel = m.UpdateRecord(update="kernel", impact="reboot", scope="host", expected_s=60, timeout_s=600)
    patch = m.UpdateRecord(update="patch", impact="pause", scope="host", expected_s=1, timeout_s=9)
    able = build(
        "w1", methods=("live", "freeze", "reboot"), methods_missing={}, pause_risk="live-restore is off"
    )
    one = fleet(host("h1", able, updates=(patch, kernel)))
    (vm,) = _plan(one, "patch").waves[0].vms
    assert vm.reason.endswith("every VM of the host pauses; live-restore is off")
    (vm,) = _plan(one, "kernel", allow_reboot=True).waves[0].vms
    assert vm.reason == "the update needs a reboot"


def test_an_update_without_impact_is_live(build: Build, host: Host, fleet: MakeFleet) -> None:
    quiet = m.UpdateRecord(update="agent", impact="none", scope="host", expected_s=1, timeout_s=9)
    plan = _plan(fleet(host("h1", build("w1"), updates=(quiet,))), "agent")
    assert [vm.method for wave in plan.waves for vm in wave.vms] == ["live"]
    assert plan.expected_pause_s == 0


def test_what_an_update_does_to_the_vmm_decides_the_method(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    able = ("live", "freeze", "swap", "replace")
    beside = m.UpdateRecord(
        update="beside", impact="pause", scope="vm", expected_s=600, timeout_s=900, vmm="beside"
    )
    instead = m.UpdateRecord(
        update="instead", impact="pause", scope="host", expected_s=1, timeout_s=9, vmm="instead"
    )
    single = m.UpdateRecord(update="single", impact="pause", scope="vm", expected_s=1, timeout_s=9)
    one = fleet(
        host(
            "h1",
            build("w1", methods=able),
            build("w2", domain=1, methods=able),
            updates=(beside, instead, single),
        )
    )
    plan = _plan(one, "beside")  # its ten minutes are spent before the pause: no budget is asked for them
    assert [(vm.vm, vm.method) for wave in plan.waves for vm in wave.vms] == [("w1", "swap"), ("w2", "swap")]
    assert [wave.domains for wave in plan.waves] == [{"web": 0}, {"web": 1}]
    plan = _plan(one, "single")
    assert {vm.method for wave in plan.waves for vm in wave.vms} == {"freeze"}
    one = fleet(host("h1", build("w1", methods=able), build("w3", methods=able), updates=(instead,)))
    assert [vm.method for wave in _plan(one, "instead").waves for vm in wave.vms] == ["replace", "replace"]


def test_a_vm_that_cannot_swap_is_refused_by_name_and_never_frozen_instead(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    beside = m.UpdateRecord(update="vmm", impact="pause", scope="vm", expected_s=1, timeout_s=9, vmm="beside")
    plan = _plan(fleet(host("h1", build("w1"), updates=(beside,))), "vmm")
    assert _reasons(plan)["w1"] == "cannot swap: no second process to swap to"


def test_hosts_must_agree_on_what_an_update_does_to_the_vmm(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    def update(vmm: m.VmmChange) -> m.UpdateRecord:
        return m.UpdateRecord(update="vmm", impact="pause", scope="vm", expected_s=1, timeout_s=9, vmm=vmm)

    both = fleet(
        host("h1", build("w1", methods=("swap",)), updates=(update("beside"),)),
        host("h2", build("w2", domain=1), updates=(update(""),)),
    )
    assert "otherwise than h1" in _reasons(_plan(both, "vmm"))["h2"]


def test_stopped_vms_are_skipped_with_a_reason(build: Build, host: Host, fleet: MakeFleet) -> None:
    plan = _plan(fleet(host("h1", build("w1"), build("w2", state="stopped"))))
    assert [(vm.vm, vm.reason) for vm in plan.skipped] == [("w2", "the VM is stopped")]


def test_single_vms_of_a_host_scope_update_are_refused(build: Build, host: Host, fleet: MakeFleet) -> None:
    plan = _plan(fleet(host("h1", build("w1"))), selection=m.Selection(vms=("w1",)))
    assert "every VM of a host" in _reasons(plan)["patch"]


def test_a_freeze_on_demand_takes_only_the_vms_asked_for_one_domain_at_a_time(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    one = fleet(host("h1", build("w1"), build("w2", domain=1), build("w3", domain=1)))
    plan = make_plan(
        one.snapshot(), update="", selection=m.Selection(vms=("w1", "w3")), policy=m.Policy(), hold_s=9.0
    )
    assert [[vm.vm for vm in wave.vms] for wave in plan.waves] == [["w1"], ["w3"]]
    assert plan.expected_pause_s == 9.0


def test_an_empty_fleet_says_so() -> None:
    assert "no host has reported" in _reasons(_plan(FleetLookup(FleetState())))["fleet"]


_PLACEMENT = st.dictionaries(
    st.sampled_from([f"h{n}" for n in range(8)]),
    st.dictionaries(st.sampled_from(["web", "db", "mq"]), st.integers(0, 4), min_size=1),
    min_size=1,
)


@given(_PLACEMENT)
def test_no_wave_ever_holds_two_domains_of_a_set(placement: dict[str, dict[str, int]]) -> None:
    inventories = [
        m.HostInventory(
            host=name,
            driver="process",
            epoch=1,
            guard="ready",
            commands=COMMANDS,
            updates=(
                m.UpdateRecord(update="patch", impact="pause", scope="host", expected_s=2, timeout_s=9),
            ),
            vms=tuple(
                m.VmRecord(
                    vm=f"{each}-{name}", set=each, update_domain=domain, state="running", methods=("freeze",)
                )
                for each, domain in sets.items()
            ),
        )
        for name, sets in placement.items()
    ]
    present = [m.HostPresence(host=each.host, online=True, instance="i") for each in inventories]
    plan = _plan(FleetLookup(refold(FleetState(), *inventories, *present)))
    assert sorted(host for wave in plan.waves for host in wave.hosts) == sorted(placement)
    for wave in plan.waves:
        for vm in wave.vms:
            assert wave.domains[vm.set] == vm.update_domain


def test_a_vm_in_no_set_does_not_pull_its_host_forward(build: Build, host: Host, fleet: MakeFleet) -> None:
    plan = _plan(
        fleet(
            host("h1", build("w1")),
            host("h2", build("w2", domain=1)),
            host("h3", build("w3", domain=2), build("lone", "_lone")),
        )
    )
    assert [wave.hosts for wave in plan.waves] == [("h1",), ("h2",), ("h3",)]


@pytest.mark.parametrize(
    ("budget_s", "hold_s", "fits"), [(10.0, 7.0, True), (10.0, 7.1, False), (0.4, 0.05, False)]
)
def test_a_hold_must_leave_room_for_the_resume(
    budget_s: float, hold_s: float, fits: bool, build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = make_plan(
        fleet(host("h1", build("w1"))).snapshot(),
        update="",
        selection=m.Selection(vms=("w1",)),
        policy=m.Policy(budget_s=budget_s),
        hold_s=hold_s,
    )
    assert bool(plan.waves) is fits
    assert bool(plan.refusals) is not fits


def test_a_selected_vm_whose_host_lacks_the_update_is_named(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    record = m.UpdateRecord(update="patch", impact="pause", scope="vm", expected_s=1, timeout_s=9)
    everybody = fleet(host("h1", build("w1"), updates=(record,)), host("h2", build("w2"), updates=()))
    plan = make_plan(
        everybody.snapshot(), update="patch", selection=m.Selection(vms=("w1", "w2")), policy=m.Policy()
    )
    assert [vm.vm for vm in plan.skipped] == ["w2"]
    assert "does not define the update" in plan.skipped[0].reason


# -- proof of memory (I3) -----------------------------------------------------------------------------------

INSTEAD = m.UpdateRecord(
    update="patch", impact="pause", scope="host", expected_s=1, timeout_s=9, vmm="instead"
)
BESIDE = m.UpdateRecord(
    update="patch", impact="pause", scope="vm", expected_s=600, timeout_s=900, vmm="beside"
)
AGENT_ONLY: dict[str, tuple[m.ProofCode, ...]] = dict.fromkeys(
    ("swap", "freeze", "replace"), ("not_rebooted",)
)


def _planned(plan: m.Plan) -> dict[str, tuple[str, ...]]:
    return {vm.vm: vm.proofs for wave in plan.waves for vm in wave.vms}


def test_the_plan_says_for_each_vm_what_will_be_shown_of_its_memory(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    small = build("w1")
    large = build("w2", proofs={"freeze": ("sampled_digest_equal",)}, agent=False)
    bare = build("w3", proofs={"freeze": ()}, agent=False)
    assert _planned(_plan(fleet(host("h1", small, large, bare)))) == {
        "w1": ("digest_equal", "sampled_digest_equal", "not_rebooted"),
        "w2": ("sampled_digest_equal",),
        "w3": (),
    }


@pytest.mark.parametrize(
    ("expected_s", "budget_s", "whole"),
    [(2, 30, True), (19, 30, True), (19.5, 30, False), (26.9, 30, False), (1, 2, False)],
)
def test_no_digest_of_all_memory_is_promised_where_the_update_leaves_no_time(
    expected_s: float, budget_s: float, whole: bool, build: Build, host: Host, fleet: MakeFleet
) -> None:
    """An update of 20 to 27 s of a budget of 30 s: the host begins no digest of all memory after 20 s."""
    patch = m.UpdateRecord(update="patch", impact="pause", scope="host", expected_s=expected_s, timeout_s=29)
    plan = _plan(fleet(host("h1", build("w1"), updates=(patch,))), budget_s=budget_s, on_unproven="halt")
    assert ("digest_equal" in _planned(plan)["w1"]) is whole
    assert "sampled_digest_equal" in _planned(plan)["w1"]


@pytest.mark.parametrize("update", [INSTEAD, BESIDE])
@pytest.mark.parametrize("proofs", [AGENT_ONLY, {"freeze": ("digest_equal",)}, {}, None])
def test_a_vm_of_which_nothing_can_be_shown_is_refused_by_name_before_another_process_takes_it_over(
    update: m.UpdateRecord, proofs: Any, build: Build, host: Host, fleet: MakeFleet
) -> None:
    able = build(
        "w1", methods=("live", "freeze", "swap", "replace"), proofs=proofs, no_digest="its RAM is private"
    )
    one = fleet(host("h1", able, build("w2", methods=able.methods), updates=(update,)))
    plan = _plan(one)
    assert set(_reasons(plan)) == {"w1"}
    reason = _reasons(plan)["w1"]
    assert "--on-unproven proceed" in reason
    assert "CAESURA_VM_AGENT_CANARY_BYTES" in reason
    assert ("its RAM is private" in reason) is (proofs is not None)
    assert ("update the host updater" in reason) is (proofs is None)
    assert ("not rebooted is not a proof" in reason) is (proofs is AGENT_ONLY)
    assert not _plan(one, on_unproven="proceed").refusals


def test_a_freeze_is_refused_for_want_of_a_proof_only_when_asked(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """The same process keeps the memory, so a freeze is not asked for a proof by default."""
    one = fleet(host("h1", build("w1", proofs=AGENT_ONLY)))
    assert not _plan(one).refusals
    assert "no proof can be made that freeze" in _reasons(_plan(one, on_unproven="halt"))["w1"]
    hold = make_plan(
        one.snapshot(),
        update="",
        selection=m.Selection(vms=("w1",)),
        policy=m.Policy(on_unproven="halt"),
        hold_s=3.0,
    )
    assert "no proof can be made that freeze" in _reasons(hold)["w1"]


def test_a_canary_is_a_proof_and_a_reboot_or_a_live_update_is_asked_for_none(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    canary = {"replace": ("canary_equal", "not_rebooted")}
    able = build("w1", methods=("live", "replace", "reboot"), proofs=canary)
    assert not _plan(fleet(host("h1", able, updates=(INSTEAD,)))).refusals
    bare = build("w1", methods=("live", "reboot"), proofs={})
    for impact in ("none", "reboot"):
        other = m.UpdateRecord(
            update="patch",
            impact=impact,
            scope="host",
            expected_s=1,
            timeout_s=9,
        )
        plan = _plan(fleet(host("h1", bare, updates=(other,))), on_unproven="halt", allow_reboot=True)
        assert not plan.refusals


def _planned_vm(vm: m.VmRecord, host: str) -> m.PlannedVm:
    return m.PlannedVm(
        vm=vm.vm,
        set=vm.set,
        update_domain=vm.update_domain,
        host=host,
        method="freeze",
        reason="",
        agent=False,
    )


def test_what_no_wave_would_start_with_refuses_the_plan_by_name(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """Accepted, it would have warned the workloads, waited, and halted for what was known when it was planned."""
    dead = msgspec.structs.replace(build("w1"), state_detail="/bin/web was ended by SIGKILL")
    one = fleet(host("h1", dead), host("h2", build("w2")))
    assert "/bin/web was ended by SIGKILL" in _reasons(_plan(one))["w1"]
    assert health_blockers(one, (_planned_vm(dead, "h1"),)), "the same fact, the same refusal"
    without = make_plan(
        one.snapshot(),
        update="patch",
        selection=m.Selection(),
        policy=m.Policy(),
        limits=m.Limits(exclude_vms=("w1",)),
    )
    assert not without.refusals
    assert [wave.hosts for wave in without.waves] == [("h2",)]


def test_a_host_that_does_not_read_this_coordinators_commands_is_refused_by_name(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """A host updater of before 0.1.0 says nothing of commands: it would never receive one, and the wave would time out."""
    one = fleet(
        host("h1", build("w1")),
        host("h2", build("w2", domain=1), commands=()),
        host("h3", build("w3", domain=2), commands=("caesura.operation.start.v1",)),
    )
    refusals = {each.subject: each for each in _plan(one).refusals}
    assert set(refusals) == {"h2", "h3"}
    assert {each.code for each in refusals.values()} == {"host_outdated"}
    assert "caesura.operation.start.v1, caesura.operation.abort.v1" in refusals["h2"].reason
    assert "upgrade" in refusals["h2"].reason
    assert "caesura.operation.start.v1" not in refusals["h3"].reason
    assert not _plan(one).waves


def test_a_host_that_reads_more_than_it_is_sent_is_planned(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    newer = (*COMMANDS, "caesura.operation.of-a-later-version.v1")
    assert _plan(fleet(host("h1", build("w1"), commands=newer))).waves


def test_what_a_newer_host_can_do_and_show_does_not_make_its_inventory_unreadable(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """A method or proof of a later version is passed over: what both know is planned."""
    record = build(
        "w1",
        methods=("freeze", "hibernate-elsewhere"),
        proofs={
            "freeze": ("signed_by_hardware", "digest_equal"),
            "hibernate-elsewhere": ("signed_by_hardware",),
        },
    )
    payload = msgspec.json.encode(host("h1", record))
    (wave,) = _plan(fleet(msgspec.json.decode(payload, type=m.HostInventory))).waves
    (planned,) = wave.vms
    assert (planned.method, planned.proofs) == ("freeze", ("digest_equal",))


# -- another kernel under the VMs -----------------------------------------------------------------------------

_KERNEL = m.UpdateRecord(
    update="kernel",
    version="6.1.192",
    impact="pause",
    scope="host",
    expected_s=3.0,
    timeout_s=60.0,
    kernel="kexec",
    kernel_release="6.1.0-9-amd64",
)


def _figure(seconds: float, to: str = "6.1.0-9-amd64", day: int = 1) -> m.KernelFigure:
    return m.KernelFigure(
        to=to, former="6.1.0-8-amd64", seconds=seconds, at=datetime(2026, 1, day, tzinfo=UTC)
    )


def _kernel(*figures: m.KernelFigure, kexec: bool = True, problems: tuple[str, ...] = ()) -> m.HostKernel:
    return m.HostKernel(release="6.1.0-8-amd64", kexec=kexec, figures=figures, problems=problems)


def test_a_measured_host_starts_another_kernel_under_its_vms(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    vms = [build(name, domain=number, methods=("freeze", "kexec")) for number, name in enumerate(("a", "b"))]
    hosts = [
        host(f"h{number}", vm, updates=(_KERNEL,), kernel=_kernel(_figure(12.0 + number)))
        for number, vm in enumerate(vms)
    ]
    plan = _plan(fleet(*hosts), "kernel", budget_s=30.0)
    assert not plan.refusals
    assert [wave.hosts for wave in plan.waves] == [("h0",), ("h1",)]
    assert {vm.method for wave in plan.waves for vm in wave.vms} == {"kexec"}
    assert all("6.1.0-9-amd64" in vm.reason for wave in plan.waves for vm in wave.vms)
    assert plan.event_type == "Freeze"
    assert plan.expected_pause_s == 13.0, "the slowest of the measured hosts"
    assert plan.outside_pause_s >= 60.0 + RETURN_S


@pytest.mark.parametrize(
    ("kernel", "code", "words"),
    [
        (None, "kernel_not_ready", "prepare-kexec"),
        (_kernel(_figure(12.0), kexec=False), "kernel_not_ready", "[kernel] kexec = true"),
        (_kernel(_figure(12.0), problems=("no DAX",)), "kernel_not_ready", "no DAX"),
        (_kernel(), "kernel_unmeasured", "rehearse-kexec 6.1.0-9-amd64"),
        (_kernel(_figure(12.0, to="6.1.0-7-amd64")), "kernel_unmeasured", "rehearse-kexec"),
        (_kernel(_figure(20.1)), "budget_too_short", "20.1 s"),
        (_kernel(_figure(12.0, day=1), _figure(25.0, day=2)), "budget_too_short", "25.0 s on 2026-01-02"),
    ],
)
def test_no_kernel_without_a_prepared_and_measured_host(
    kernel: m.HostKernel | None, code: str, words: str, build: Build, host: Host, fleet: MakeFleet
) -> None:
    one = host("h1", build("a", methods=("kexec",)), updates=(_KERNEL,), kernel=kernel)
    plan = _plan(fleet(one), "kernel", budget_s=30.0)
    assert [(each.subject, each.code) for each in plan.refusals] == [("h1", code)]
    assert words in plan.refusals[0].reason
    assert not plan.waves


def test_a_vm_that_cannot_cross_a_kernel_is_refused_with_its_reason(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    vm = build("a", methods=("freeze",), methods_missing={"kexec": "it has a TPM"})
    plan = _plan(
        fleet(host("h1", vm, updates=(_KERNEL,), kernel=_kernel(_figure(9.0)))), "kernel", budget_s=30.0
    )
    assert "it has a TPM" in _reasons(plan)["a"]


def test_hosts_that_start_a_kernel_and_hosts_that_freeze_define_two_updates(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    other = msgspec.structs.replace(_KERNEL, kernel="", kernel_release="")
    one = host("h1", build("a", methods=("kexec",)), updates=(_KERNEL,), kernel=_kernel(_figure(9.0)))
    plan = _plan(fleet(one, host("h2", build("b"), updates=(other,))), "kernel", budget_s=30.0)
    assert [each.code for each in plan.refusals] == ["update_differs"]
