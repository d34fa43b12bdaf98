"""Every query of dashboards and rules, asked of a live Prometheus: what comes back empty, not finite or without its labels?

For a test that has a fleet, its services and a Prometheus running, and a rollout behind it::

    async with api("http://127.0.0.1:9090") as prometheus:
        wrong = await problems(prometheus, Path("grafana/dashboards").glob("*.json"), since=started)
    assert not wrong

A query may be masked (``or vector(0)``, ``sum(1 - ...)``), so each of its selectors must have data as well: a misspelt
metric or label value is always named.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from caesura_testing.prometheus import Prometheus, PrometheusError, Rule, Series

ONLY_WHEN_WRONG: Mapping[str, str] = {
    'ALERTS{alertstate="firing"': "an alert fires",
    'status="failed"}': "a wave failed",
    "caesura_rollout_halted": "a rollout is halted",
    "caesura_host_pause_overrun_age_seconds": "a pause was longer than its budget",
    "caesura_host_guard_resume_age_seconds": "a pause guard ended a pause",
}
"""Parts of selectors that have no data in a fleet that is well, and what it takes."""


class Query(msgspec.Struct, frozen=True):
    """One query, ready to be asked."""

    where: str
    expr: str
    labels: tuple[str, ...] = ()
    """What its legend and its links need of every series."""


class Window(msgspec.Struct, frozen=True):
    """The time to look at, and how."""

    start: float
    end: float
    step_s: float
    rate_interval: str


async def problems(
    prometheus: Prometheus,
    dashboards: Iterable[Path],
    *,
    since: float,
    step_s: float = 1.0,
    rate_interval: str = "20s",
    excused: Mapping[str, str] = ONLY_WHEN_WRONG,
    choose: Mapping[str, str] | None = None,
) -> list[str]:
    """What is wrong with the dashboards' queries and with the loaded rules; empty when all is well.

    Args:
        since: unix time at which the fleet began; looked at is the time from then to now.
        step_s: resolution; at most the scrape interval, or a short pause is overlooked.
        rate_interval: put in place of ``$__rate_interval``; at least four scrape intervals.
        excused: parts of selectors that may have no data; with {} everything must have been seen.
        choose: value of a variable that takes one, by its name; else its first value is taken.
    """
    window = Window(since, time.time(), step_s, rate_interval)
    found: list[str] = []
    for path in dashboards:
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        found += await dashboard_problems(prometheus, dashboard, window, excused, choose)
    rules = await prometheus.rules()
    if not rules:
        found.append("rules: none is loaded")
    return found + await rule_problems(prometheus, rules, window, excused)


async def dashboard_problems(
    prometheus: Prometheus,
    dashboard: Mapping[str, Any],
    window: Window,
    excused: Mapping[str, str],
    choose: Mapping[str, str] | None = None,
) -> list[str]:
    """What is wrong with one dashboard's variables, annotations and panels."""
    found: list[str] = []
    values = {"__rate_interval": window.rate_interval, "__interval": f"{max(1, round(window.step_s))}s"}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        where = f"{dashboard['title']} / ${variable['name']}"
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        if asked is None:
            found.append(f"{where}: not understood: {variable['query']['query']}")
            continue
        selector = substituted(asked[1], values)
        try:
            options = await prometheus.label_values(asked[2], selector, window.start, window.end)
        except PrometheusError as error:
            found.append(f"{where}: {error}")
            options = []
        name = variable["name"]
        chosen = (choose or {}).get(name, next(iter(options), ""))
        if chosen not in options:
            found.append(f"{where}: no value {chosen} of {asked[2]} in {selector}")
        values[name] = all_of(variable, options) if variable["includeAll"] else chosen
    for query in queries_of(dashboard, values):
        found += await _query_problems(prometheus, query, window, excused)
    return found


async def rule_problems(
    prometheus: Prometheus, rules: Iterable[Rule], window: Window, excused: Mapping[str, str]
) -> list[str]:
    """What is wrong with rules: their operands must have data, and what is recorded must be there and finite."""
    found: list[str] = []
    for rule in rules:
        where = f"rule {rule.name}"
        if rule.health != "ok":
            found.append(f"{where}: {rule.health} {rule.error}".rstrip())
        found += await _selector_problems(prometheus, Query(where, rule.expr), window, excused)
        if rule.kind == "recording":
            found += await _query_problems(prometheus, Query(where, rule.name), window, excused)
    return found


def queries_of(dashboard: Mapping[str, Any], values: Mapping[str, str]) -> Iterator[Query]:
    """Queries of panels and annotations with their variables filled in."""
    title = dashboard["title"]
    for annotation in dashboard.get("annotations", {}).get("list", ()):
        if "expr" in annotation:
            labels = _labels_in(annotation["titleFormat"])
            yield Query(f"{title} / {annotation['name']}", substituted(annotation["expr"], values), labels)
    for panel in dashboard["panels"]:
        link = json.dumps(panel.get("fieldConfig", {}).get("defaults", {}).get("links", ""))
        linked = tuple(re.findall(r"__field\.labels\.(\w+)", link))
        for target in panel.get("targets", ()):
            labels = (*_labels_in(target.get("legendFormat", "")), *linked)
            if "le" in labels and panel["type"] != "heatmap":
                raise AssertionError(f"{title} / {panel['title']} shows buckets")
            where = f"{title} / {panel['title']} / {target['refId']}"
            yield Query(where, substituted(target["expr"], values), labels)


def substituted(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its ``$variables`` filled in.

    Raises:
        KeyError: a variable that the dashboard does not have.
    """
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], text)


_NAME = re.compile(r"(?<![\w.:$])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\s*\()(?![\w:])")
_NOT_METRICS = {"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring", "inf", "nan"}


def selectors(expr: str) -> list[str]:
    """The vector selectors in an expression, in order, each once.

    Good for queries without comments and without braces inside strings, as the project's are.
    """
    bare = re.sub(r'(\{[^}]*\})|"[^"]*"', r"\1", expr)  # strings, such as the arguments of label_replace
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)  # ranges
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    found = (f"{name}{matchers or ''}" for name, matchers in _NAME.findall(bare) if name not in _NOT_METRICS)
    return list(dict.fromkeys(found))


def all_of(variable: Mapping[str, Any], options: Iterable[str]) -> str:
    """What Grafana puts in for "All": the variable's own value for it, or every option as one regular expression."""
    every = "|".join(re.escape(option).replace("\\", "\\\\") for option in options)
    return str(variable.get("allValue") or f"({every})")


def _labels_in(template: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\{\{\s*(\w+)\s*\}\}", template))


async def _query_problems(
    prometheus: Prometheus, query: Query, window: Window, excused: Mapping[str, str]
) -> list[str]:
    missing = await _selector_problems(prometheus, query, window, excused)
    try:
        answer = await prometheus.range(query.expr, window.start, window.end, window.step_s)
    except PrometheusError as error:
        return [*missing, f"{query.where}: {error}"]
    if missing or (not answer and _is_excused(query.expr, excused)):
        return missing
    return [f"{query.where}: {each}" for each in _answer_problems(query, answer)]


def _answer_problems(query: Query, answer: list[Series]) -> Iterator[str]:
    if not any(math.isfinite(value) for series in answer for value in series.values):
        yield f"no finite point from {query.expr}"
    for label in dict.fromkeys(query.labels):
        if any(not series.labels.get(label) for series in answer):
            yield f"a series without the label {label} from {query.expr}"


async def _selector_problems(
    prometheus: Prometheus, query: Query, window: Window, excused: Mapping[str, str]
) -> list[str]:
    return [
        f"{query.where}: no data for {selector}"
        for selector in selectors(query.expr)
        if not _is_excused(selector, excused)
        and not await prometheus.there_is(selector, window.start, window.end)
    ]


def _is_excused(text: str, excused: Mapping[str, str]) -> bool:
    return any(part in text for part in excused)
