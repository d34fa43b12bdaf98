"""The rules of Grafana's dashboard-linter (github.com/grafana/dashboard-linter, docs/rules), as far as they are about Prometheus.

The linter itself is a Go program that is in no package registry of this project. What it cannot judge (whether a query
has an answer) is in tests/integration/prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from caesura_testing.queries import selectors

_SOURCE = {"type": "prometheus", "uid": "$datasource"}
_NO_MATCHERS = {"ALERTS": "an alert's labels are those of its expression, and most have no job"}
"""Exceptions to target-job-rule and target-instance-rule, and why."""


def panels(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(dashboard: Any) -> Iterator[tuple[str, str]]:
    """(panel's title, expression) of every query."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def variables(dashboard: Any) -> dict[str, Any]:
    return {each["name"]: each for each in dashboard["templating"]["list"]}


def test_template_datasource_rule(dashboard: Any) -> None:
    sources = [each for each in dashboard["templating"]["list"] if each["type"] == "datasource"]
    (source,) = sources
    assert (source["name"], source["label"], source["query"]) == ("datasource", "Data Source", "prometheus")


def test_template_job_rule_and_template_instance_rule(dashboard: Any) -> None:
    for name in ("job", "instance"):
        variable = variables(dashboard)[name]
        assert variable["type"] == "query"
        assert variable["label"] == name.capitalize()
        assert variable["datasource"] == _SOURCE
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["allValue"] == ".+"


def test_template_label_promql_rule(dashboard: Any) -> None:
    asked = [each for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert len(asked) >= 2
    for variable in asked:
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert found, variable["name"]
        assert found[2] == variable["name"]
        assert selectors(found[1]) == [found[1]], "exactly one selector"


def test_template_on_time_change_reload_rule(dashboard: Any) -> None:
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["refresh"] == 2, (
                f"{variable['name']} is not asked again when the time range changes"
            )


def test_panel_datasource_rule(dashboard: Any) -> None:
    for panel in panels(dashboard):
        assert panel["datasource"] == _SOURCE, panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == _SOURCE, panel["title"]
    for annotation in dashboard.get("annotations", {}).get("list", ()):
        assert annotation["datasource"] == _SOURCE, annotation["name"]


def test_panel_title_description_rule(dashboard: Any) -> None:
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))


def test_panel_units_rule(dashboard: Any) -> None:
    # Those of Grafana's list (packages/grafana-data/src/valueFormats/categories.ts) that are in use here.
    known = {"none", "short", "s", "percentunit", "bytes", "reqps", "cps"}
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"] in known, panel["title"]


def test_target_job_rule_and_target_instance_rule(dashboard: Any) -> None:
    excused = set()
    for title, expr in targets(dashboard):
        for selector in selectors(expr):
            metric = selector.partition("{")[0]
            if metric in _NO_MATCHERS:
                excused.add(metric)
                continue
            assert 'job=~"$job"' in selector, f"{title}: {selector}"
            assert 'instance=~"$instance"' in selector, f"{title}: {selector}"
    assert excused == (set(_NO_MATCHERS) if dashboard["uid"] == "caesura-suite-health" else set())


def test_target_rate_interval_rule(dashboard: Any) -> None:
    for title, expr in targets(dashboard):
        rates = re.findall(r"\b(?:rate|irate|increase)\([^\[]*\[([^\]]*)\]", expr)
        assert len(rates) == len(re.findall(r"\b(?:rate|irate|increase)\(", expr)), title
        for window in rates:
            assert window == "$__rate_interval", f"{title}: {window}"


def test_template_uneditable_rule(dashboard: Any) -> None:
    assert dashboard["editable"] is False


def test_template_required_variables_are_used(dashboard: Any) -> None:
    whole = " ".join(expr for _, expr in targets(dashboard))
    for name in variables(dashboard).keys() - {"datasource"}:
        assert f"${name}" in whole, name
    unknown = set(re.findall(r"\$(\w+)", whole)) - variables(dashboard).keys()
    assert unknown <= {"__rate_interval", "__interval"}
