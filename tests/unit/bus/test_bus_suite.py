"""What the bus conformance suite makes of a broker that does not keep every promise."""

from __future__ import annotations

import pytest

from caesura.conformance.buses import BrokerCapabilities, BusConformance, MemoryHarness

_TEST = "test_a_late_subscriber_gets_the_newest_retained_message"
_OTHER = "test_one_message_is_handled_at_a_time"


class _Whole(BusConformance):
    """Nothing is left out."""


class _Part(BusConformance, missing={BrokerCapabilities.RETAIN: "of one node"}):
    """Without what is retained."""


def test_tests_of_a_missing_promise_are_not_collected_and_all_others_are() -> None:
    assert callable(getattr(_Whole, _TEST))
    assert getattr(_Part, _TEST) is None
    left_out = {name for name in dir(_Part) if name.startswith("test_") and getattr(_Part, name) is None}
    assert left_out == {
        _TEST,
        "test_retained_messages_outlive_a_killed_broker",
        "test_a_filter_that_is_added_later_brings_what_is_retained",
        "test_the_last_will_is_retained",
    }
    assert callable(getattr(_Part, _OTHER))
    assert callable(getattr(BusConformance, _TEST)), "the suite itself is whole"


async def test_where_the_harness_alone_says_so_it_is_an_expected_failure_with_the_reason() -> None:
    harness = MemoryHarness()
    harness.missing = {BrokerCapabilities.RETAIN: "of one node"}
    with pytest.raises(pytest.xfail.Exception, match="of one node"):
        await getattr(_Whole(), _TEST)(harness)
