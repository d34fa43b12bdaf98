"""Which VMs an order concerns, and which of them may pause at the same time."""

from __future__ import annotations

import pytest

from caesura_rehearse.simulation.members import SetMember, first_event, members_of, plan_waves
from caesura_rehearse.simulation.orders import Order, OrderRefused

WEB = members_of("web", 3)
DB = members_of("db", 2)


def _vms(order: Order, members: tuple[SetMember, ...]) -> list[list[tuple[str, ...]]]:
    return [[part.vms for part in wave] for wave in plan_waves(order, members)]


def test_vms_are_spread_round_robin() -> None:
    assert [each.vm for each in WEB] == ["web-1", "web-2", "web-3"]
    assert [each.update_domain for each in members_of("web", 7, 5)] == [0, 1, 2, 3, 4, 0, 1]


def test_a_set_is_taken_domain_by_domain() -> None:
    assert _vms(Order(sets=("web",)), WEB + DB) == [[("web-1",)], [("web-2",)], [("web-3",)]]
    assert _vms(Order(), members_of("web", 4, 2)) == [[("web-1", "web-3")], [("web-2", "web-4")]]


def test_sets_share_their_hosts() -> None:
    assert _vms(Order(), WEB + DB) == [[("web-1",), ("db-1",)], [("web-2",), ("db-2",)], [("web-3",)]]


def test_named_vms_are_one_wave() -> None:
    assert _vms(Order(vms=("db-2", "web-1")), WEB + DB) == [[("web-1",), ("db-2",)]]


def test_no_wave_has_two_domains_of_a_set() -> None:
    for order in (Order(), Order(sets=("web", "db")), Order(sets=("db",))):
        for wave in plan_waves(order, members_of("web", 9, 4) + members_of("db", 5, 3)):
            assert len({part.set for part in wave}) == len(wave)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (Order(vms=("web-7",)), r"there is no VM web-7 here, did you mean web-\d\? There are: web-1, web-2, web-3"),
        (Order(sets=("wbe",)), "there is no set wbe here, did you mean web"),
        (Order(sets=("other",)), "there is no set other here: web"),
        (Order(vms=("web-1", "web-2")), "web-1 and web-2 are in two update domains of web"),
        (Order(vms=("web-1",), sets=("web",)), "exclude each other"),
    ],
)  # fmt: skip
def test_what_cannot_be_ordered(order: Order, says: str) -> None:
    with pytest.raises(OrderRefused, match=says):
        plan_waves(order, WEB)


def test_nothing_to_order_for() -> None:
    with pytest.raises(OrderRefused, match="there is no VM"):
        plan_waves(Order(), ())


def test_one_event_is_for_one_domain_of_one_set() -> None:
    assert first_event(Order(), WEB + DB).vms == ("web-1",)
    assert first_event(Order(), members_of("web", 4, 2)).vms == ("web-1", "web-3")
    assert first_event(Order(vms=("db-2",)), WEB + DB).set == "db"
    for order in (Order(sets=("web",)), Order(vms=("web-1", "db-1"))):
        with pytest.raises(OrderRefused, match="order a rollout"):
            first_event(order, WEB + DB)
