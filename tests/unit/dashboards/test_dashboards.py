"""The dashboards are what the code makes, the SDK reads them as they are, and what they name exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from caesura_metrics_exporter.metrics.rollout_families import WAVE_STATUS_NUMBERS
from caesura_testing.queries import all_of, queries_of, selectors, substituted

with warnings.catch_warnings():
    # It would rather have the schema of Grafana 12 and later used, which 11 does not read.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

_ROOT = Path(__file__).parents[3]
_GRAFANA = _ROOT / "grafana"


def generate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grafana.generate", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
    )


def test_the_committed_files_are_what_the_code_makes() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_a_missing_and_a_foreign_file_are_named_and_writing_heals_them(tmp_path: Path) -> None:
    folder = tmp_path / "dashboards"
    shutil.copytree(_GRAFANA / "dashboards", folder)
    changed = folder / "overview.json"
    changed.write_text(changed.read_text(encoding="utf-8").replace("caesura_vms", "caesura_wms"))
    (folder / "suite-health.json").unlink()
    (folder / "old.json").write_text("{}")
    done = generate("--check", "--folder", folder)
    assert done.returncode == 1
    assert "old.json, overview.json, suite-health.json;" in done.stderr
    assert generate("--write", "--folder", folder).returncode == 0
    assert generate("--check", "--folder", folder).returncode == 0


def test_the_sdk_reads_and_writes_them_as_they_are(dashboard: Any) -> None:
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    assert again == dashboard


def test_panels_are_numbered_asked_and_on_the_page(dashboard: Any) -> None:
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert numbers == list(range(1, len(numbers) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        where = panel["gridPos"]
        assert where["x"] >= 0
        assert where["x"] + where["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(where["x"], where["x"] + where["w"])
            for y in range(where["y"], where["y"] + where["h"])
        }
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
        if panel["type"] != "row":
            refs = [target["refId"] for target in panel["targets"]]
            assert refs == [chr(ord("A") + number) for number in range(len(refs))]
            assert refs
        if "legend" in panel.get("options", {}) and panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"] is True


def test_the_first_screen_answers_what_an_operator_asks_first(dashboards: dict[str, Any]) -> None:
    first = [panel["title"] for panel in dashboards["overview.json"]["panels"] if panel["gridPos"]["y"] == 0]
    assert first[:4] == ["VMs paused now", "Sets in a rollout", "Sets halted", "Budget used"]


def test_every_metric_is_one_that_a_service_serves(dashboards: dict[str, Any]) -> None:
    page = (_ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    served = set(re.findall(r"^\| `(caesura_\w+)` \|", page, re.MULTILINE))
    served |= {
        f"{name}_{part}"
        for name in re.findall(r"^\| `(caesura_\w+)` \| histogram", page, re.MULTILINE)
        for part in ("bucket", "sum", "count")
    }
    # Prometheus' own of every target, its alerts, and prometheus_client's of the process.
    served |= {"up", "ALERTS", "scrape_duration_seconds", "scrape_samples_post_metric_relabeling"}
    served.add("process_resident_memory_bytes")
    names = {
        selector.partition("{")[0]
        for dashboard in dashboards.values()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for selector in selectors(target["expr"])
    }
    assert len(names) > 30
    assert not names - served


def test_links_lead_to_a_dashboard_with_the_variables_that_they_set(dashboards: dict[str, Any]) -> None:
    by_uid = {each["uid"]: each for each in dashboards.values()}
    links = re.findall(r"/d/([\w-]+)\?([^\"]+)", json.dumps(dashboards))
    assert len(links) > 3
    for uid, words in links:
        known = {each["name"] for each in by_uid[uid]["templating"]["list"]}
        given = re.findall(r"var-(\w+)=\$\{([^}]+)\}", words)
        assert {name for name, _ in given} == {"datasource", "fleet", "set", "update_domain"}
        assert {name for name, _ in given} <= known
        # A label's value is data: unencoded it could say anything in the address.
        assert all(value.endswith(":percentencode") for name, value in given if name != "datasource")


def test_waves_and_halts_are_marked_where_pauses_are_shown(dashboards: dict[str, Any]) -> None:
    for name in ("overview.json", "update-domain.json"):
        marks = dashboards[name]["annotations"]["list"]
        assert [each["name"] for each in marks] == ["Wave starts", "Wave ends", "Halts"]
        # The value is the time, in milliseconds: one mark a wave, however often it is scraped.
        assert all(each["useValueForTime"] and each["expr"].endswith("* 1000") for each in marks)


def test_all_jobs_of_a_prometheus_are_not_all_ours(dashboards: dict[str, Any]) -> None:
    """With the variable job at All, what every target has is still asked of Caesura's alone."""
    foreign = ("up", "scrape_", "process_")
    asked = [
        target["expr"]
        for dashboard in dashboards.values()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        if any(selector.startswith(foreign) for selector in selectors(target["expr"]))
    ]
    assert len(asked) == 4
    for expr in asked:
        assert 'job=~"caesura-.+"' in expr or "and on (job, instance) caesura_exporter_build_info" in expr


def test_what_is_so_now_is_asked_of_now(dashboards: dict[str, Any]) -> None:
    """A range's last value outlives the exporter: a dead one would still say "online"."""
    for dashboard in dashboards.values():
        for panel in dashboard["panels"]:
            if panel["type"] in {"stat", "bargauge", "table"}:
                assert all(target["instant"] and not target["range"] for target in panel["targets"]), panel[
                    "title"
                ]


def test_all_of_a_variable_is_a_list_or_its_own_value() -> None:
    assert all_of({}, ["host-1", "rack.2"]) == r"(host\\-1|rack\\.2)"
    assert all_of({"allValue": ".+"}, ["x"]) == ".+"


def test_states_have_the_numbers_that_the_exporter_gives_them() -> None:
    asked = "import json; from grafana.generate.queries import STATES; print(json.dumps(STATES))"
    out = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True, cwd=_ROOT).stdout
    assert dict(enumerate(name for name, _ in json.loads(out))) == {
        0: "no rollout",
        **{number: status for status, number in WAVE_STATUS_NUMBERS.items()},
    }


def test_provisioning_has_the_scrape_interval_and_the_variable_that_compose_sets() -> None:
    source = yaml.safe_load((_GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    scrapes = yaml.safe_load((_ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (only,) = source["datasources"]
    assert only["jsonData"]["timeInterval"] == scrapes["global"]["scrape_interval"]
    assert only["url"] == "${CAESURA_PROMETHEUS_URL}"
    (provider,) = yaml.safe_load((_GRAFANA / "provisioning" / "dashboards" / "caesura.yml").read_text())[
        "providers"
    ]
    assert provider["allowUiUpdates"] is False
    assert provider["options"]["path"] == "/var/lib/caesura/dashboards"


@pytest.mark.parametrize(
    ("expr", "found"),
    [
        ("up", ["up"]),
        ('max by (set) (a_b{set="x", le=~"1|2"} > bool 0) or vector(0)', ['a_b{set="x", le=~"1|2"}']),
        ("increase(a[5m]) / on (job) group_left (set) b offset 1h", ["a", "b"]),
        ("(a unless a offset 20s) or increase(a[20s])", ["a"]),
        ("level:metric:sum > 1e3 and on () time() - 30", ["level:metric:sum"]),
        ("histogram_quantile(0.99, sum by (le) (rate(x_bucket[1m]))) >= 0", ["x_bucket"]),
        ('max by (b) (label_replace(a{c="d"}, "b", "what it is", "", ""))', ['a{c="d"}']),
    ],
)
def test_selectors_are_found_in_expressions(expr: str, found: list[str]) -> None:
    assert selectors(expr) == found


def test_variables_are_filled_in_and_an_unknown_one_is_an_error() -> None:
    assert substituted('a{job=~"$job"}[$__rate_interval]', {"job": ".+", "__rate_interval": "9s"}) == (
        'a{job=~".+"}[9s]'
    )
    with pytest.raises(KeyError, match="jobb"):
        substituted("$jobb", {"job": ".+"})


def test_a_panels_queries_need_what_its_legend_and_links_name() -> None:
    panel = {
        "title": "P",
        "type": "timeseries",
        "targets": [{"refId": "A", "expr": "a", "legendFormat": "{{set}} of {{host}}"}],
        "fieldConfig": {"defaults": {"links": [{"url": "${__field.labels.update_domain:percentencode}"}]}},
    }
    (query,) = queries_of({"title": "D", "panels": [panel]}, {})
    assert query.labels == ("set", "host", "update_domain")
