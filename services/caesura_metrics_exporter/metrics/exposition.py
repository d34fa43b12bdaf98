"""Metric families as text. Lines of series that did not change since the previous scrape are not rendered again.

``prometheus_client`` takes some 10 µs a series in every case: too long for tens of thousands. The output here
equals its output (a test compares the two), in either text format: both have the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from caesura.runtime.fleet_label import LABEL
from caesura_metrics_exporter.metrics.families import Family, HistogramFamily
from caesura_metrics_exporter.metrics.series import Buckets, Labels, ends

AnyFamily = Family | HistogramFamily

_PIECE = 64  # the most changed series in one piece
_AS_IT_IS = 1_000_000  # numbers from here on are written with an exponent


class _Written(msgspec.Struct):
    """A family at the last scrape, and its rendered text."""

    values: Mapping[Labels, object]
    heads: dict[Labels, tuple[str, ...]]
    """Name and labels of each line of a series."""
    parts: dict[Labels, str]
    """The lines of each series."""
    text: str


class Renderer:
    """Renders scrapes, one after the other.

    Args:
        fleet: the label of that name on every series that has none; empty: there is none.
    """

    def __init__(self, fleet: str = "") -> None:
        self._fleet = fleet
        self._written: dict[str, _Written] = {}

    def render(self, families: Iterable[AnyFamily], *, modern: bool) -> str:
        """The families as text; ``modern``: in OpenMetrics, without its end."""
        return "".join(self.parts(families, modern=modern))

    def parts(self, families: Iterable[AnyFamily], *, modern: bool) -> Iterator[str]:
        """The same in pieces, so that other tasks run between them. The iteration may be abandoned at any piece."""
        for family in families:
            if isinstance(family, HistogramFamily):
                yield _head(family.name, family.text, "histogram", modern=modern)
                yield from self._histogram(family)
                continue
            total = "_total" if family.kind == "counter" else ""
            yield _head(family.name + ("" if modern else total), family.text, family.kind, modern=modern)
            yield from self._simple(family, family.name + total)

    def _simple(self, family: Family, name: str) -> Iterator[str]:
        written = self._of(name)
        if written.values != family.values:
            heads, parts = written.heads, written.parts
            for number, labels in enumerate(_changed(written.values, family.values)):
                head = heads.get(labels)
                if head is None:
                    head = heads[labels] = (_series(name, *self._labelled(family.names, labels)),)
                parts[labels] = f"{head[0]} {_number(family.values[labels])}\n"
                if number % _PIECE == _PIECE - 1:
                    yield ""
            _keep(written, family.values)
        yield written.text

    def _histogram(self, family: HistogramFamily) -> Iterator[str]:
        written = self._of(family.name)
        if written.values != family.values:
            heads, parts = written.heads, written.parts
            for number, labels in enumerate(_changed(written.values, family.values)):
                head = heads.get(labels)
                if head is None:
                    head = heads[labels] = _bucket_heads(family, *self._labelled(family.names, labels))
                parts[labels] = _bucket_lines(head, family.values[labels])
                if number % _PIECE == _PIECE - 1:
                    yield ""
            _keep(written, family.values)
        yield written.text

    def _labelled(self, names: Labels, labels: Labels) -> tuple[Labels, Labels]:
        if not self._fleet or LABEL in names:
            return names, labels
        return (*names, LABEL), (*labels, self._fleet)

    def _of(self, name: str) -> _Written:
        written = self._written.get(name)
        if written is None:
            written = self._written[name] = _Written({}, {}, {}, "")
        return written


class Wanted(Collector):
    """Only metrics with these sample names; all of them if no names are given."""

    def __init__(self, metrics: Iterable[Metric], names: frozenset[str]) -> None:
        self._metrics = metrics
        self._names = names

    def collect(self) -> Iterable[Metric]:
        """In their original order."""
        for family in self._metrics:
            if not self._names:
                yield family
                continue
            family.samples = [each for each in family.samples if each.name in self._names]
            if family.samples:
                yield family


def encoded(metrics: Iterable[Metric], accept: str, names: frozenset[str] = frozenset()) -> bytes:
    """As ``prometheus_client`` renders it, in the accepted format."""
    registry = CollectorRegistry()
    encoder, _ = choose_encoder(accept)
    registry.register(Wanted(metrics, names))
    return bytes(encoder(registry))


def _keep(written: _Written, values: Mapping[Labels, object]) -> None:
    if len(written.parts) != len(values):  # some were removed
        for labels in written.parts.keys() - values.keys():
            del written.parts[labels], written.heads[labels]
    written.values = values
    written.text = "".join(written.parts.values())


def _changed(before: Mapping[Labels, object], now: Mapping[Labels, object]) -> list[Labels]:
    if list(before) == list(now):  # the usual case, without hashing labels
        pairs = zip(now.values(), before.values(), strict=True)
        return [labels for labels, (new, old) in zip(now, pairs, strict=True) if new != old]
    known = before.get
    return [labels for labels, value in now.items() if known(labels) != value]


def _head(name: str, text: str, kind: str, *, modern: bool) -> str:
    escaped = _escaped(text) if modern else text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n"


def _series(name: str, names: Labels, labels: Labels) -> str:
    pairs = ",".join(
        f'{label}="{_escaped(value)}"' for label, value in sorted(zip(names, labels, strict=True))
    )
    return f"{name}{{{pairs}}}" if pairs else name


def _bucket_heads(family: HistogramFamily, own: Labels, labels: Labels) -> tuple[str, ...]:
    """The templates of each bucket, the count and the sum; and last one for all of them, for counts that need no exponent."""
    names = (*own, "le")
    buckets = (_series(f"{family.name}_bucket", names, (*labels, end)) for end in ends(family.bounds))
    rest = (_series(f"{family.name}_{part}", own, labels) for part in ("count", "sum"))
    heads = (*buckets, *rest)
    whole = "".join(f"{head.replace('%', '%%')} %d.0\n" for head in heads[:-1])
    return (*heads, f"{whole}{heads[-1].replace('%', '%%')} %s\n")


def _bucket_lines(heads: tuple[str, ...], values: Buckets) -> str:
    counts, total = values
    seen = list(accumulate(counts))
    if seen[-1] < _AS_IT_IS:
        return heads[-1] % (*seen, seen[-1], _number(total))
    lines = zip(heads, (*seen, seen[-1], total), strict=False)
    return "".join([f"{head} {_number(value)}\n" for head, value in lines])


def _number(value: float) -> str:
    if type(value) is int and 0 <= value < _AS_IT_IS:
        return f"{value}.0"
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
