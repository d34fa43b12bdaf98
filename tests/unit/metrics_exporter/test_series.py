"""Counters, histograms and the memory of what was counted."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_metrics_exporter.deduplication import Deduplicator
from caesura_metrics_exporter.metrics.series import Counts, Histogram, Largest

BOUNDS = (0.1, 1.0, 30.0)


def test_counts_by_label_values() -> None:
    counts = Counts("host", "outcome")
    counts.add("h1", "ok")
    counts.add("h1", "ok", by=2)
    counts.add("h2", "bad", by=0)
    assert list(counts.items()) == [(("h1", "ok"), 3.0), (("h2", "bad"), 0.0)]
    counts.forget("host", "h1")
    counts.forget("set", "h2")
    assert list(counts.items()) == [(("h2", "bad"), 0.0)]


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="host"):
        Counts("host").add("h1", "ok")
    with pytest.raises(ValueError, match="host"):
        Histogram(BOUNDS, "host").observe(1.0)


def test_a_value_on_a_boundary_belongs_to_its_bucket() -> None:
    histogram = Histogram(BOUNDS)
    histogram.observe(30.0)
    histogram.observe(30.000001)
    ((_, buckets, total),) = histogram.items()
    assert buckets == [("0.1", 0), ("1", 0), ("30", 1), ("+Inf", 2)]
    assert total == pytest.approx(60.000001)


@given(st.lists(st.floats(0, 100), min_size=1))
def test_buckets_are_cumulative_and_count_everything_once(values: list[float]) -> None:
    histogram = Histogram(BOUNDS, "set")
    for value in values:
        histogram.observe(value, "web")
    ((labels, buckets, total),) = histogram.items()
    assert labels == ("web",)
    ordered = sorted(values)
    assert [count for _, count in buckets[:-1]] == [
        bisect_left(ordered, bound) + ordered.count(bound) for bound in BOUNDS
    ]
    end, count = buckets[-1]
    assert (end, int(count)) == ("+Inf", len(values))
    assert total == pytest.approx(sum(values))
    histogram.forget("set", "web")
    assert list(histogram.items()) == []


def test_a_key_is_first_once_while_remembered() -> None:
    seen = Deduplicator(2)
    assert [seen.first(key) for key in ("a", "a", "b", "a", "c")] == [True, False, True, False, True]
    # b was pushed out by c: memory is bounded. a was asked for after it, so it stayed until then.
    assert [seen.first(key) for key in ("c", "b")] == [False, True]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(-3, 3))))
def test_the_largest_by_magnitude_is_what_looking_at_all_would_find(
    steps: list[tuple[str, int | None]],
) -> None:
    largest, naive = Largest(), dict[str, float]()
    for name, value in steps:
        if value is None:
            largest.drop(name)
            naive.pop(name, None)
        else:
            largest.put(name, value)
            naive[name] = value
        assert len(largest) == len(naive)
        best = min(naive.items(), key=lambda each: (-abs(each[1]), each[0]), default=None)
        assert largest.top() == best


def test_what_was_the_largest_long_ago_takes_no_room() -> None:
    largest = Largest()
    for number in range(1000):
        largest.put("vm", 1000 - number)
    assert len(largest._heap) < 20
    assert largest.top() == ("vm", 1)
