"""What is written out by hand is what ``prometheus_client`` would write, whatever changed since the scrape before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from caesura.runtime.fleet_label import OfFleet
from caesura_metrics_exporter.metrics.exposition import AnyFamily, Renderer
from caesura_metrics_exporter.metrics.families import Family, HistogramFamily
from caesura_metrics_exporter.metrics.series import Buckets, Labels

NAMES = ("set", "host", "method")
BOUNDS = (0.001, 1.0, 30.0)

texts = st.text(max_size=4) | st.sampled_from(['a"b', "back\\slash", "two\nlines", "50 %d", "é", ""])
labels = st.tuples(texts, st.sampled_from("ab"), st.sampled_from("cd"))
# Zero has one sign here: values that compare equal are not written again.
numbers = (
    st.integers(0, 2_000_000)
    | st.floats().map(lambda value: value + 0.0)
    | st.booleans()
    | st.sampled_from([1e6, 1e21, -1e7, 999_999, 0.1])
)
buckets = st.tuples(st.tuples(*[st.integers(0, 3) | st.just(400_000)] * 4), st.floats(0, 1e9))


class Fixed(Collector):
    """These families."""

    def __init__(self, families: list[AnyFamily]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return [family.metric() for family in self._families]


def by_hand(renderer: Renderer, families: list[AnyFamily], *, modern: bool) -> list[str]:
    return sorted(renderer.render(families, modern=modern).split("\n"))


def by_the_library(families: list[AnyFamily], *, modern: bool) -> list[str]:
    registry = CollectorRegistry()
    registry.register(OfFleet(Fixed(families), "east"))
    encoder: Any = generate_openmetrics if modern else generate_latest
    text = encoder(registry).decode()
    return sorted(text.removesuffix("# EOF\n").split("\n"))


@pytest.mark.parametrize("modern", [False, True])
@settings(max_examples=150, deadline=None)
@given(
    scrapes=st.lists(
        st.tuples(st.dictionaries(labels, numbers, max_size=5), st.dictionaries(labels, buckets, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_each_scrape_says_what_the_library_would(
    modern: bool, scrapes: list[tuple[Mapping[Labels, float], Mapping[Labels, Buckets]]]
) -> None:
    renderer = Renderer("east")
    for values, observed in scrapes:
        families: list[AnyFamily] = [
            Family("caesura_a", 'A "gauge" \\ of\ntwo lines.', "gauge", NAMES, dict(values)),
            Family("caesura_b", "A counter.", "counter", NAMES, dict(values)),
            Family("caesura_c", "Without labels.", "gauge", (), {(): len(values)}),
            Family("caesura_e", "Has one of its own.", "gauge", ("fleet",), {("west",): 1}),
            HistogramFamily("caesura_d", "Pauses.", NAMES, BOUNDS, dict(observed)),
        ]
        assert by_hand(renderer, families, modern=modern) == by_the_library(families, modern=modern)


def test_what_did_not_change_is_not_written_again() -> None:
    renderer = Renderer()
    values: dict[Labels, float] = {("web", "h", "freeze"): 1.0}
    first = renderer.render([Family("a", "A.", "gauge", NAMES, dict(values))], modern=False)
    kept = renderer._written["a"].parts["web", "h", "freeze"]
    values["db", "h", "freeze"] = 2.0
    renderer.render([Family("a", "A.", "gauge", NAMES, dict(values))], modern=False)
    assert renderer._written["a"].parts["web", "h", "freeze"] is kept
    del values["db", "h", "freeze"]
    assert renderer.render([Family("a", "A.", "gauge", NAMES, values)], modern=False) == first
    assert set(renderer._written["a"].heads) == set(values), "what is gone takes no room"


def test_a_scrape_that_was_given_up_leaves_nothing_wrong() -> None:
    renderer = Renderer("east")
    many: dict[Labels, float] = {(f"s{number}", "h", "freeze"): 1.0 for number in range(200)}
    next(
        piece
        for piece in renderer.parts([Family("a", "A.", "gauge", NAMES, many)], modern=False)
        if not piece
    )
    few: list[AnyFamily] = [Family("a", "A.", "gauge", NAMES, {("s1", "h", "freeze"): 2.0})]
    assert by_hand(renderer, few, modern=False) == by_the_library(few, modern=False)
    assert len(renderer._written["a"].heads) == 1
