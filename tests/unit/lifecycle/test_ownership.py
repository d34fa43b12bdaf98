from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.lifecycle.ownership import Ownership, conflict, settle


def inventory(host: str, *vms: str) -> m.HostInventory:
    records = tuple(m.VmRecord(vm=vm, set="web", update_domain=0, state="running") for vm in vms)
    return m.HostInventory(host=host, driver="process", epoch=1, vms=records)


def own(ownership: Ownership, host: str) -> list[str]:
    return [record.vm for record in ownership.judged(host).vms]


def affected(ownership: Ownership, changed: Mapping[str, tuple[str, str] | None]) -> set[str]:
    """The hosts whose inventories count differently when these VMs have other owners: those that lost or got one that they name."""
    return {
        host
        for vm, hosts in changed.items()
        if hosts is not None
        for host in hosts
        if ownership.names(host, vm)
    }


def test_the_record_decides_and_not_the_order_of_arrival() -> None:
    steps: list[Callable[[Ownership], object]] = [
        lambda it: it.put_record("web-1", "a"),
        lambda it: it.put_inventory(inventory("a", "web-1")),
        lambda it: it.put_inventory(inventory("b", "db-1", "web-1")),
    ]
    for order in itertools.permutations(steps):
        ownership = Ownership()
        for step in order:
            step(ownership)
        assert own(ownership, "a") == ["web-1"]
        assert own(ownership, "b") == ["db-1"]
        assert ownership.may_speak("a", "web-1")
        assert not ownership.may_speak("b", "web-1")
        assert ownership.contested == {"web-1"}
        assert ownership.foreign() == {"b": 1}


def test_a_host_that_does_not_report_keeps_what_it_has_on_record() -> None:
    ownership = Ownership()
    ownership.put_record("web-1", "a")
    ownership.put_inventory(inventory("b", "web-1"))
    assert settle(ownership, ["web-1"], lambda host: host == "b") == {}
    assert own(ownership, "b") == []


def test_without_a_record_the_only_host_that_names_it_has_it() -> None:
    ownership = Ownership()
    assert ownership.may_speak("a", "web-1"), "nobody has named it"
    ownership.put_inventory(inventory("a", "web-1"))
    assert own(ownership, "a") == ["web-1"]
    assert settle(ownership, ["web-1"], lambda _: False) == {"web-1": "a"}
    changed = ownership.put_inventory(inventory("b", "web-1"))
    assert changed == {"web-1": ("a", "")}, "what counts of a changed with b's word"
    assert affected(ownership, changed) == {"a"}
    assert (own(ownership, "a"), own(ownership, "b")) == ([], [])
    assert settle(ownership, ["web-1"], lambda _: False) == {"web-1": ""}


@pytest.mark.parametrize(
    ("online", "still_named", "expected"),
    [(True, False, {"web-1": "b"}), (False, False, {}), (True, True, {}), (False, True, {})],
)
def test_a_vm_is_released_by_the_inventory_of_a_host_that_is_online(
    online: bool, still_named: bool, expected: dict[str, str]
) -> None:
    ownership = Ownership()
    ownership.put_record("web-1", "a")
    ownership.put_inventory(inventory("a", *(["web-1"] if still_named else [])))
    ownership.put_inventory(inventory("b", "web-1"))
    assert settle(ownership, ["web-1"], lambda _: online) == expected


def test_what_nobody_names_any_more_is_on_no_record() -> None:
    ownership = Ownership()
    ownership.put_record("web-1", "a")
    ownership.put_inventory(inventory("a"))
    assert settle(ownership, ["web-1"], lambda _: True) == {"web-1": None}


def test_a_record_of_nobody_is_believed_until_it_changes() -> None:
    ownership = Ownership()
    ownership.put_record("web-1", "")
    ownership.put_inventory(inventory("a", "web-1"))
    assert own(ownership, "a") == []
    assert settle(ownership, ["web-1"], lambda _: False) == {"web-1": "a"}
    changed = ownership.put_record("web-1", "a")
    assert changed == ("", "a")
    assert affected(ownership, {"web-1": changed}) == {"a"}
    assert own(ownership, "a") == ["web-1"]


def test_a_conflict_says_who_and_what_to_do() -> None:
    assert "belongs to a" in conflict("a", ["b"])
    assert "rename one" in conflict("", ["a", "b"])


_HOSTS = ("a", "b", "c")
_VMS = ("x", "y", "z")
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("inventory"), st.sampled_from(_HOSTS), st.frozensets(st.sampled_from(_VMS))),
        st.tuples(st.just("forget"), st.sampled_from(_HOSTS), st.just(frozenset())),
        st.tuples(st.just("settle"), st.sampled_from(_HOSTS), st.just(frozenset())),
        st.tuples(st.just("record"), st.sampled_from(("", *_HOSTS)), st.frozensets(st.sampled_from(_VMS))),
        st.tuples(st.just("unrecord"), st.just(""), st.frozensets(st.sampled_from(_VMS))),
    ),
    max_size=20,
)


def settled(ownership: Ownership, online: str, raw: Mapping[str, frozenset[str]]) -> set[str]:
    """Change the records as they must, while one host is online; the hosts whose inventories count differently."""
    changed: set[str] = set()
    for vm, owner in settle(ownership, _VMS, lambda host: host == online).items():
        before = ownership.record(vm)
        assert not before or (before == online and vm not in raw[online]), (
            "only a host that is online releases"
        )
        changed |= affected(ownership, {vm: ownership.put_record(vm, owner)})
    return changed


@given(_STEPS)
def test_what_counts_is_always_what_was_told_last(steps: list[tuple[str, str, frozenset[str]]]) -> None:
    """Whoever keeps only what each step gave back knows the same as whoever asks for everything."""
    ownership, kept, raw = Ownership(), dict[str, m.HostInventory](), dict[str, frozenset[str]]()
    for what, host, vms in steps:
        match what:
            case "inventory":
                raw[host] = vms
                changed = {host} | affected(ownership, ownership.put_inventory(inventory(host, *sorted(vms))))
            case "forget":
                kept.pop(host, None)
                raw.pop(host, None)
                changed = affected(ownership, ownership.drop_inventory(host))
            case "settle":
                changed = settled(ownership, host, raw)
            case _:
                owner = host if what == "record" else None
                changed = affected(ownership, {vm: ownership.put_record(vm, owner) for vm in vms})
        kept |= {name: ownership.judged(name) for name in changed}
        assert kept == {name: ownership.judged(name) for name in raw}
        for vm in _VMS:
            holders = [name for name in raw if any(record.vm == vm for record in kept[name].vms)]
            assert len(holders) <= 1, "a VM counts for one host"
            assert (vm in ownership.contested) == bool(ownership.rivals(vm))
