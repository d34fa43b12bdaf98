"""The trees of filters and of retained topics find what comparing each with each would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from caesura.bus.filters import check_filter, matches
from caesura.bus.routes import FilterTree, RetainedTopics

_LEVELS = st.sampled_from(["a", "b", "$sys", ""])
_TOPICS = st.lists(_LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
_FILTERS = (
    st.tuples(st.lists(st.sampled_from(["a", "b", "$sys", "", "+"]), max_size=4), st.booleans())
    .map(lambda made: "/".join([*made[0], *(["#"] if made[1] else [])]))
    .filter(bool)
)


@given(st.lists(st.tuples(_FILTERS, st.integers(0, 3), st.booleans()), max_size=12), _TOPICS)
def test_filters_are_found_as_by_comparing(changes: list[tuple[str, int, bool]], topic: str) -> None:
    tree: FilterTree[int] = FilterTree()
    there: set[tuple[str, int]] = set()
    for topic_filter, value, added in changes:
        check_filter(topic_filter)
        if added:
            tree.add(topic_filter, value)
            there.add((topic_filter, value))
        else:
            tree.discard(topic_filter, value)
            there.discard((topic_filter, value))
    assert tree.covering(topic) == {value for topic_filter, value in there if matches(topic_filter, topic)}


@given(st.lists(st.tuples(_TOPICS, st.booleans()), max_size=12), _FILTERS)
def test_topics_are_found_as_by_comparing(changes: list[tuple[str, bool]], topic_filter: str) -> None:
    retained = RetainedTopics()
    there: dict[str, bytes] = {}
    for number, (topic, stored) in enumerate(changes):
        if stored:
            retained[topic] = there[topic] = b"%d" % number
        else:
            assert retained.pop(topic, None) == there.pop(topic, None)
    assert dict(retained) == there
    found = list(retained.covered_by(topic_filter))
    assert len(found) == len(set(found))
    assert set(found) == {topic for topic in there if matches(topic_filter, topic)}


def test_what_is_discarded_leaves_nothing_behind() -> None:
    tree: FilterTree[str] = FilterTree()
    tree.add("a/+/c", "x")
    tree.discard("a/+/c", "x")
    tree.discard("a/+/d", "x")
    assert not tree._root.below
    retained = RetainedTopics()
    retained["a/b/c"] = b"1"
    del retained["a/b/c"]
    assert not retained._root.below
