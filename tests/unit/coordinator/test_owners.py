"""Records of owners on their way to the bus: each is looked at once, not again for every message of another VM."""

from __future__ import annotations

from caesura.contract import messages as m
from caesura.fleet.state import FleetState
from caesura_coordinator.owners import Owners
from caesura_coordinator.store import CoordinatorStore


def _owners() -> Owners:
    owners = Owners(CoordinatorStore(":memory:"), FleetState())
    owners.lead(2)
    return owners


def _inventory(host: str, *vms: str) -> m.HostInventory:
    records = tuple(
        m.VmRecord(vm=vm, set="web", update_domain=0, state="running", methods=("freeze",)) for vm in vms
    )
    return m.HostInventory(host=host, driver="process", epoch=2, vms=records, guard="ready")


def _named(owners: Owners) -> list[tuple[str, str]]:
    return [(vm, owner.host if owner else "") for vm, owner in owners.unpublished()]


def test_what_is_on_its_way_is_not_named_again_for_what_comes_later() -> None:
    owners = _owners()
    owners.reported(_inventory("host-1", "web-1", "web-2"), 0.0)
    assert _named(owners) == [("web-1", "host-1"), ("web-2", "host-1")]
    owners.reported(_inventory("host-2", "web-3"), 0.0)
    assert _named(owners) == [("web-3", "host-2")]
    assert _named(owners) == []


def test_what_was_not_published_is_named_again() -> None:
    owners = _owners()
    owners.reported(_inventory("host-1", "web-1", "web-2"), 0.0)
    first = owners.unpublished()
    owners.not_published(vm for vm, _ in first)
    assert owners.unpublished() == first


def test_another_record_on_the_bus_is_replaced_and_our_own_is_left() -> None:
    owners = _owners()
    owners.reported(_inventory("host-1", "web-1"), 0.0)
    ((vm, owner),) = owners.unpublished()
    assert owner is not None
    owners.published(vm, owner)
    owners.observed(vm, owner)
    assert owners.unpublished() == []
    owners.observed(vm, m.VmOwner(vm=vm, host="host-9", epoch=1))
    assert owners.unpublished() == [(vm, owner)]
    owners.published(vm, owner)
    owners.reconnected()
    assert owners.unpublished() == [(vm, owner)]


def test_an_older_record_that_the_broker_accepts_last_is_named_again() -> None:
    owners = _owners()
    owners.reported(_inventory("host-1", "web-1"), 0.0)
    ((vm, older),) = owners.unpublished()
    owners.reported(_inventory("host-2", "web-1"), 0.0)
    ((_, newer),) = owners.unpublished()
    assert newer is not None
    assert newer != older
    owners.published(vm, newer)
    owners.published(vm, older)
    assert owners.unpublished() == [(vm, newer)]
