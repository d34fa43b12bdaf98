"""What the publisher keeps of what it hears."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from caesura.contract.messages import HostInventory, SetDocument, VmOwner, VmRecord
from caesura.fleet.retained_messages import Cleared
from caesura_metadata_publisher.directory import Directory


def inventory(host: str, *vms: str, set_name: str = "web") -> HostInventory:
    records = tuple(VmRecord(vm=vm, set=set_name, update_domain=1, state="running") for vm in vms)
    return HostInventory(host=host, driver="process", epoch=1, vms=records)


def document(incarnation: int) -> SetDocument:
    return SetDocument(set="web", incarnation=incarnation, events=())


def owned(directory: Directory, vm: str, host: str) -> None:
    directory.take(VmOwner(vm=vm, host=host, epoch=1), 0.0)


def places(directory: Directory, vm: str) -> tuple[str, str] | None:
    """Host and set of a VM."""
    placed = directory.vm(vm)
    return (placed.host, placed.record.set) if placed is not None else None


def test_a_vm_is_where_the_record_says_in_whatever_order_inventories_come() -> None:
    steps: list[Callable[[Directory], object]] = [
        lambda it: owned(it, "web-1", "host-1"),
        lambda it: it.take(inventory("host-1", "web-1", "web-2"), 0.0),
        lambda it: it.take(inventory("host-2", "web-1", set_name="mine"), 0.0),
    ]
    for order in itertools.permutations(steps):
        directory = Directory()
        for step in order:
            step(directory)
        assert places(directory, "web-1") == ("host-1", "web")
        assert directory.foreign_hosts("web-1") == ("host-2",)
        owned(directory, "web-1", "host-2")
        assert places(directory, "web-1") == ("host-2", "mine")


def test_without_a_record_a_vm_of_two_hosts_is_nowhere() -> None:
    directory = Directory()
    directory.take(inventory("host-1", "web-1"), 0.0)
    assert places(directory, "web-1") == ("host-1", "web")
    directory.take(inventory("host-2", "web-1", set_name="mine"), 0.0)
    assert directory.vm("web-1") is None
    directory.take(Cleared(HostInventory, {"host": "host-2"}), 0.0)
    assert places(directory, "web-1") == ("host-1", "web")
    owned(directory, "web-1", "")
    assert directory.vm("web-1") is None
    directory.take(Cleared(VmOwner, {"vm": "web-1"}), 0.0)
    assert places(directory, "web-1") == ("host-1", "web")


def test_a_vm_that_its_host_no_longer_has_is_gone() -> None:
    directory = Directory()
    directory.take(inventory("host-1", "web-1"), 0.0)
    directory.take(inventory("host-1"), 0.0)
    assert directory.vm("web-1") is None


@given(st.lists(st.integers(0, 20), min_size=1))
def test_what_was_shown_never_goes_back(incarnations: list[int]) -> None:
    directory = Directory()
    shown = -1
    for incarnation in incarnations:
        kept = directory.take(document(incarnation), 0.0).word
        now = directory.document("web")
        assert now is not None
        assert now.incarnation == max(shown, incarnation)
        assert kept == (incarnation > shown)
        shown = now.incarnation


def test_a_document_that_was_cleared_is_still_shown() -> None:
    directory = Directory()
    directory.take(document(3), 0.0)
    directory.take(Cleared(SetDocument, {"set": "web"}), 0.0)
    assert directory.document("web") == document(3)


def test_a_record_of_a_lower_epoch_counts_where_nobody_is_known_to_lead() -> None:
    """A publisher does not read who leads, and an operator may have had an epoch forgotten that nobody claimed."""
    directory = Directory()
    for host in ("host-1", "host-2"):
        directory.take(inventory(host, "web-1"), 0.0)
    directory.take(VmOwner(vm="web-1", host="host-1", epoch=2**50), 0.0)
    directory.take(VmOwner(vm="web-1", host="host-2", epoch=7), 0.0)
    assert places(directory, "web-1") == ("host-2", "web")
