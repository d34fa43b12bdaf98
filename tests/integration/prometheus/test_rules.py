"""The configuration and the rules, judged by promtool; every alert and record is tested, and every alert explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from caesura_testing.queries import selectors

_ROOT = Path(__file__).parents[3]
_DEPLOY = _ROOT / "deploy" / "prometheus"
_RULES = sorted((_DEPLOY / "rules").glob("*.yml"))
_TESTS = sorted((_DEPLOY / "tests").glob("*.yml"))

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (on Debian: apt-get install prometheus)",
)


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_nothing_wakes_anybody_while_nothing_happens() -> None:
    """A critical alert says in its expression that a rollout runs or a VM is paused, or tells of such a time."""
    of_a_pause = {"CaesuraPausedBeyondBudget", "CaesuraTwoDomainsPaused", "CaesuraGuestMemoryChanged"}
    found = [
        rule
        for path in _RULES
        for group in loaded(path)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    by_name = defaultdict(list)
    for rule in found:
        by_name[rule["alert"]].append(rule)
    for name, both in by_name.items():
        severities = [rule["labels"]["severity"] for rule in both]
        if "critical" in severities and name not in of_a_pause:
            assert severities == ["critical", "warning"], name
            awake, asleep = (" ".join(rule["expr"].split()) for rule in both)
            assert re.search(r"and on \(fleet\) .*fleet:caesura_active:bool.* == 1$", awake), name
            assert awake.replace(" and on (fleet) ", " unless on (fleet) ") == asleep, name
            assert both[0]["annotations"] == both[1]["annotations"]
            assert both[0]["for"] == both[1]["for"]
        else:
            assert len(both) == 1, name


def rules(kind: str) -> dict[str, dict[str, Any]]:
    return {
        rule[kind]: rule
        for path in _RULES
        for group in loaded(path)["groups"]
        for rule in group["rules"]
        if kind in rule
    }


@needs_promtool
def test_the_configuration_is_valid_and_loads_the_rules() -> None:
    done = promtool("check", "config", _DEPLOY / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(_RULES)} rule files found" in done.stdout


@needs_promtool
def test_the_example_for_an_installation_of_ones_own_is_valid() -> None:
    done = promtool("check", "config", "--syntax-only", _DEPLOY / "examples" / "own-installation.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("path", _RULES, ids=lambda path: path.stem)
def test_rules_are_valid(path: Path) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("path", _TESTS, ids=lambda path: path.stem)
def test_rules_do_what_they_are_for(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    seen: dict[str, set[bool]] = defaultdict(set)
    for path in _TESTS:
        for group in loaded(path)["tests"]:
            for check in group.get("alert_rule_test", ()):
                seen[check["alertname"]].add(bool(check["exp_alerts"]))
    alerts = rules("alert")
    assert len(alerts) > 10
    assert dict(seen) == {name: {False, True} for name in alerts}


def test_every_record_is_tested_with_a_result() -> None:
    tested = {
        name
        for path in _TESTS
        for group in loaded(path)["tests"]
        for check in group.get("promql_expr_test", ())
        if check["exp_samples"]
        for name in selectors(check["expr"])
    }
    records = rules("record")
    assert records
    assert set(records) == {name.partition("{")[0] for name in tested}


def test_records_are_named_level_metric_operation() -> None:
    for name in rules("record"):
        assert re.fullmatch(r"(fleet|set(_update_domain)?(_le)?):caesura_\w+:\w+", name), name


def test_every_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on() -> None:
    alerts = rules("alert")
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in {"warning", "critical"}, name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        # tests/architecture/test_docs.py holds the pages.
        assert rule["annotations"]["runbook_url"] == f"docs/operate/runbooks/{name}.md", name


def test_every_job_says_which_service_it_is() -> None:
    for path in (_DEPLOY / "prometheus.yml", _DEPLOY / "examples" / "own-installation.yml"):
        jobs = {job["job_name"]: job for job in loaded(path)["scrape_configs"]}
        services = ("metrics-exporter", "coordinator", "host-updater", "metadata-publisher")
        assert set(jobs) == {f"caesura-{service}" for service in services}
        for service in services:
            for group in jobs[f"caesura-{service}"]["static_configs"]:
                assert group["labels"] == {"service": service}
