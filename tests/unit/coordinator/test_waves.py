"""How large a wave may be, who goes first, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.names import own_set
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.plan import make_plan, nothing_to_do

Build = Callable[..., m.VmRecord]
Host = Callable[..., m.HostInventory]
MakeFleet = Callable[..., FleetLookup]

_AT = datetime(2026, 4, 20, 9, 30, tzinfo=UTC)


def _plan(fleet: FleetLookup, selection: m.Selection | None = None, **limits: Any) -> m.Plan:
    return make_plan(
        fleet.snapshot(),
        update="patch",
        selection=selection or m.Selection(),
        policy=m.Policy(),
        limits=m.Limits(**limits),
    )


def _hosts(plan: m.Plan) -> list[tuple[str, ...]]:
    return [wave.hosts for wave in plan.waves]


def _alone(build: Build, host: Host, count: int) -> list[m.HostInventory]:
    """Hosts with one VM each that is in no set."""
    return [host(f"h{number}", build(f"v{number}", own_set(f"v{number}"))) for number in range(1, count + 1)]


def test_hosts_whose_vms_have_no_set_are_not_all_paused_at_once(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(*_alone(build, host, 4)))
    assert _hosts(plan) == [("h1",), ("h2",), ("h3",), ("h4",)]
    assert plan.max_hosts == 1
    assert plan.max_hosts_by_default


def test_by_default_it_is_a_tenth_of_them(build: Build, host: Host, fleet: MakeFleet) -> None:
    plan = _plan(fleet(*_alone(build, host, 29)))
    assert [len(wave.hosts) for wave in plan.waves] == [2] * 14 + [1]


def test_by_default_sets_are_limited_by_their_domains_alone(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """And a host with a VM in no set shares a wave with those, but not with another of its kind."""
    plan = _plan(
        fleet(
            *(host(f"h{number}", build(f"w{number}")) for number in range(5)),
            host("x1", build("solo1", own_set("solo1"))),
            host("x2", build("solo2", own_set("solo2"))),
        )
    )
    assert _hosts(plan) == [("x1", "h0", "h1", "h2", "h3", "h4"), ("x2",)]
    only_sets = _plan(fleet(*(host(f"h{number}", build(f"w{number}")) for number in range(5))))
    assert _hosts(only_sets) == [("h0", "h1", "h2", "h3", "h4")]
    assert only_sets.max_hosts == 0


def test_what_is_asked_for_limits_every_wave(build: Build, host: Host, fleet: MakeFleet) -> None:
    hosts = [host(f"h{number}", build(f"w{number}", domain=number // 3)) for number in range(6)]
    plan = _plan(fleet(*hosts), max_hosts=2)
    assert _hosts(plan) == [("h0", "h1"), ("h2",), ("h3", "h4"), ("h5",)]
    assert [wave.domains for wave in plan.waves] == [{"web": 0}, {"web": 0}, {"web": 1}, {"web": 1}]
    assert not plan.max_hosts_by_default
    assert _hosts(_plan(fleet(*_alone(build, host, 4)), max_hosts=3)) == [("h1", "h2", "h3"), ("h4",)]


def test_it_limits_the_hosts_of_an_update_that_pauses_vm_by_vm(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    """There a set's domain is a unit of its own, and it is on several hosts."""
    single = m.UpdateRecord(
        update="patch", version="1", impact="pause", scope="vm", expected_s=2.0, timeout_s=9.0
    )
    hosts = [
        host(f"h{number}", build(f"w{number}"), build(f"d{number}", "db", number % 2), updates=(single,))
        for number in range(4)
    ]
    assert _hosts(_plan(fleet(*hosts))) == [("h0", "h2", "h1", "h3"), ("h1", "h3")]
    limited = _plan(fleet(*hosts), max_hosts=1)
    assert all(len(wave.hosts) == 1 for wave in limited.waves)
    assert sorted(vm.vm for wave in limited.waves for vm in wave.vms) == sorted(
        vm.vm for each in hosts for vm in each.vms
    )


def test_a_canary_goes_first_and_alone(build: Build, host: Host, fleet: MakeFleet) -> None:
    hosts = [host(f"h{number}", build(f"w{number}", domain=number // 2)) for number in range(4)]
    named = _plan(fleet(*hosts), canary_host="h3")
    assert _hosts(named) == [("h3",), ("h0", "h1"), ("h2",)]
    assert [wave.canary for wave in named.waves] == [True, False, False]
    counted = _plan(fleet(*hosts), canary_count=1)
    assert _hosts(counted) == [("h0",), ("h1",), ("h2", "h3")]


def test_a_canary_of_several_hosts_never_has_two_domains_of_a_set(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    hosts = [host(f"h{number}", build(f"w{number}", domain=number // 2)) for number in range(4)]
    assert _hosts(_plan(fleet(*hosts), canary_count=3)) == [("h0", "h1"), ("h2", "h3")]


def test_a_canary_is_as_large_as_was_asked_for_though_nothing_is_said_of_the_rest(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    assert _hosts(_plan(fleet(*_alone(build, host, 4)), canary_count=2)) == [("h1", "h2"), ("h3",), ("h4",)]


def test_a_canary_that_is_none_is_refused_by_name(build: Build, host: Host, fleet: MakeFleet) -> None:
    known = fleet(host("h1", build("w1")), host("h2", build("d1", "db")))
    unknown = _plan(known, canary_host="h3")
    assert [each.subject for each in unknown.refusals] == ["h3"]
    assert "no host of this name" in unknown.refusals[0].reason
    outside = _plan(known, m.Selection(sets=("web",)), canary_host="h2")
    assert "does nothing on this host" in outside.refusals[0].reason
    wide = _plan(known, canary_count=2, max_hosts=1)
    assert "more than the 1" in wide.refusals[0].reason


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"exclude_hosts": ("h1",)}, "host h1 was excluded"),
        ({"exclude_sets": ("db",)}, "set db of d1 was excluded"),
        ({"exclude_vms": ("d1",)}, "VM d1 was excluded"),
    ],
)
def test_what_is_excluded_excludes_its_host_from_what_pauses_hosts_whole(
    limits: dict[str, Any], why: str, build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(host("h1", build("w1"), build("d1", "db")), host("h2", build("w2"))), **limits)
    assert _hosts(plan) == [("h2",)]
    assert not plan.refusals
    assert {(each.vm, each.skip) for each in plan.skipped} == {("w1", "excluded"), ("d1", "excluded")}
    assert all(why in each.reason for each in plan.skipped)


def test_an_excluded_vm_is_left_out_alone_where_vms_are_updated_one_by_one(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    single = m.UpdateRecord(
        update="patch", version="1", impact="pause", scope="vm", expected_s=2.0, timeout_s=9.0
    )
    plan = _plan(fleet(host("h1", build("w1"), build("d1", "db"), updates=(single,))), exclude_vms=("d1",))
    assert [vm.vm for wave in plan.waves for vm in wave.vms] == ["w1"]
    assert [(each.vm, each.skip) for each in plan.skipped] == [("d1", "excluded")]


def test_a_misspelt_exclusion_is_refused_and_excludes_nothing_silently(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(host("h1", build("w1"))), exclude_sets=("wbe",))
    assert "'web'" in {each.subject: each.reason for each in plan.refusals}["wbe"]


def test_what_is_excluded_or_done_may_be_offline(build: Build, host: Host, fleet: MakeFleet) -> None:
    hosts = (host("h1", build("w1", own_set("w1"))), host("h2", build("w2", own_set("w2"))))
    assert _plan(fleet(*hosts, offline=("h1",))).refusals
    assert not _plan(fleet(*hosts, offline=("h1",)), exclude_hosts=("h1",)).refusals


def _has(version: str = "1", **more: Any) -> m.InstalledUpdate:
    return m.InstalledUpdate(update="patch", version=version, at=_AT, **more)


def test_a_host_that_has_the_update_is_not_paused_again_unless_that_is_asked_for(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    known = fleet(host("h1", build("w1"), installed=(_has(),)), host("h2", build("w2", domain=1)))
    plan = _plan(known)
    assert _hosts(plan) == [("h2",)]
    assert [(each.vm, each.skip, each.reason) for each in plan.skipped] == [
        ("w1", "installed", "h1 has patch 1 since 2026-04-20 09:30Z")
    ]
    assert _hosts(_plan(known, again=True)) == [("h1",), ("h2",)]


def test_another_version_is_another_update(build: Build, host: Host, fleet: MakeFleet) -> None:
    assert _hosts(_plan(fleet(host("h1", build("w1"), installed=(_has("0.9"),))))) == [("h1",)]


def test_of_an_update_by_vm_those_that_have_it_are_skipped(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    single = m.UpdateRecord(
        update="patch", version="1", impact="pause", scope="vm", expected_s=2.0, timeout_s=9.0
    )
    vms = (build("w1"), build("w2", domain=1))
    some = fleet(host("h1", *vms, updates=(single,), installed=(_has(vms=("w1",)),)))
    assert [vm.vm for wave in _plan(some).waves for vm in wave.vms] == ["w2"]
    every = fleet(host("h1", *vms, updates=(single,), installed=(_has(),)))
    assert {each.reason for each in _plan(every).skipped} == {
        "w1 has patch 1 since 2026-04-20 09:30Z",
        "w2 has patch 1 since 2026-04-20 09:30Z",
    }


def test_where_all_have_it_there_is_nothing_to_do_and_that_is_no_refusal(
    build: Build, host: Host, fleet: MakeFleet
) -> None:
    plan = _plan(fleet(host("h1", build("w1"), installed=(_has(),))), canary_host="h1")
    assert not plan.waves
    assert not plan.refusals
    assert "nothing to do" in nothing_to_do(plan)
    assert "--again" in nothing_to_do(plan)
    excluded = _plan(fleet(host("h1", build("w1"))), exclude_hosts=("h1",))
    assert excluded.refusals, "that everything is excluded is a mistake"
    assert nothing_to_do(excluded) == ""


@st.composite
def _fleets(draw: st.DrawFn) -> tuple[list[tuple[str, list[tuple[str, str, int]]]], dict[str, Any]]:
    hosts = []
    for number in range(draw(st.integers(1, 8))):
        sets = draw(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=3, unique=True))
        hosts.append(
            (
                f"h{number}",
                [
                    (vm := f"{name or 'solo'}{number}", name or own_set(vm), draw(st.integers(0, 2)))
                    for name in sets
                ],
            )
        )
    limits = draw(st.fixed_dictionaries({"max_hosts": st.integers(0, 3), "canary_count": st.integers(0, 3)}))
    return hosts, limits


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # they are functions without a state
@given(drawn=_fleets(), scope=st.sampled_from(["host", "vm"]))
def test_whatever_is_asked_for_every_vm_has_its_one_wave_within_the_limits(
    build: Build,
    host: Host,
    fleet: MakeFleet,
    drawn: tuple[list[tuple[str, list[tuple[str, str, int]]]], dict[str, Any]],
    scope: str,
) -> None:
    hosts, limits = drawn
    update = m.UpdateRecord(
        update="patch",
        version="1",
        impact="pause",
        scope=scope,  # type: ignore[arg-type]
        expected_s=2.0,
        timeout_s=9.0,
    )
    known = fleet(
        *(host(name, *(build(*vm) for vm in vms), updates=(update,)) for name, vms in hosts),
    )
    plan = _plan(known, **limits)
    if limits["max_hosts"] and limits["canary_count"] > limits["max_hosts"]:
        assert plan.refusals
        return
    assert not plan.refusals
    planned = sorted(vm.vm for wave in plan.waves for vm in wave.vms)
    assert planned == sorted(vm for _, vms in hosts for vm, _, _ in vms)
    canaries = {name for wave in plan.waves if wave.canary for name in wave.hosts}
    assert bool(canaries) == bool(limits["canary_count"])
    for wave in plan.waves:
        for vm in wave.vms:
            assert wave.domains[vm.set] == vm.update_domain
        assert wave.canary == (set(wave.hosts) <= canaries)
        if wave.canary:
            assert len(wave.hosts) <= limits["canary_count"]
            continue
        if limits["max_hosts"]:
            assert len(wave.hosts) <= limits["max_hosts"]
        else:
            alone = {vm.host for vm in wave.vms if vm.set == own_set(vm.vm)}
            assert len(alone) <= 1, "a tenth of up to eight hosts"
