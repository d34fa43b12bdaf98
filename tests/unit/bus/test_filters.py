from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from caesura.bus.filters import check_filter, check_topic, matches

LEVELS = st.sampled_from(["", "a", "b", "host-1", "$SYS"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = st.builds(
    lambda levels, rest: "/".join([*levels, *rest]),
    st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=4),
    st.sampled_from([[], ["#"]]),
).filter(bool)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("+/b", "a/b", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("A", "a", False),
    ],
)
def test_matches(topic_filter: str, topic: str, *, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@given(FILTERS, TOPICS)
def test_it_answers_as_paho_does(topic_filter: str, topic: str) -> None:
    assert matches(topic_filter, topic) == topic_matches_sub(topic_filter, topic)


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a\0b"])
def test_topics_that_nobody_may_publish_to(topic: str) -> None:
    with pytest.raises(ValueError, match="not a topic to publish to"):
        check_topic(topic)


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a/b#", "a+/b", "a\0b"])
def test_filters_that_no_broker_accepts(topic_filter: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        check_filter(topic_filter)


@given(FILTERS)
def test_good_filters_are_accepted(topic_filter: str) -> None:
    check_filter(topic_filter)
