"""What the publisher keeps of what it hears."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura.contract.messages import HostInventory, SetDocument, VmRecord
from caesura_metadata_publisher.directory import Directory


def inventory(host: str, *vms: str, set_name: str = "web") -> HostInventory:
    records = tuple(VmRecord(vm=vm, set=set_name, update_domain=1, state="running") for vm in vms)
    return HostInventory(host=host, driver="process", epoch=1, vms=records)


def document(incarnation: int) -> SetDocument:
    return SetDocument(set="web", incarnation=incarnation, events=())


def test_a_vm_is_where_the_last_inventory_says() -> None:
    directory = Directory()
    directory.take_inventory(inventory("host-1", "web-1", "web-2"))
    directory.take_inventory(inventory("host-2", "web-1"))
    placed = directory.vm("web-1")
    assert placed is not None
    assert placed.host == "host-2"
    # host-1 no longer lists it: that must not take it away from host-2.
    directory.take_inventory(inventory("host-1", "web-2"))
    assert directory.vm("web-1") == placed


def test_a_vm_that_its_host_no_longer_has_is_gone() -> None:
    directory = Directory()
    directory.take_inventory(inventory("host-1", "web-1"))
    directory.take_inventory(inventory("host-1"))
    assert directory.vm("web-1") is None


@given(st.lists(st.integers(0, 20), min_size=1))
def test_what_was_shown_never_goes_back(incarnations: list[int]) -> None:
    directory = Directory()
    shown = -1
    for incarnation in incarnations:
        kept = directory.take_document(document(incarnation))
        now = directory.document("web")
        assert now is not None
        assert now.incarnation == max(shown, incarnation)
        assert kept == (incarnation > shown)
        shown = now.incarnation
