"""Every query of every panel, annotation, variable and rule has an answer from a live fleet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from caesura_testing.queries import ONLY_WHEN_WRONG, Window, dashboard_problems, problems, rule_problems

_ROOT = Path(__file__).parents[3]
_DASHBOARDS = sorted((_ROOT / "grafana" / "dashboards").glob("*.json"))
_PAUSES = "sum(caesura_pause_seconds_count)"


async def test_a_rollout_and_a_halted_one_answer_every_query(scene: Any) -> None:
    prometheus = scene.prometheus
    began = time.time()
    state = await scene.roll("patch")
    assert state.status == "completed", state.reason
    await prometheus.until(f"{_PAUSES} == 2")
    await prometheus.until("set:caesura_rollout_waves_completed:ratio == 1")
    await prometheus.until("count(set_update_domain:caesura_pause_seconds:p99_1h) == 2")

    # A fleet that is well: what may be missing is what has gone wrong nowhere.
    for domain in ("0", "1"):
        chosen = {"set": "web", "update_domain": domain}
        found = await problems(prometheus, _DASHBOARDS, since=began, rate_interval="5s", choose=chosen)
        assert not found, "\n".join(found)
    assert await prometheus.firing() == set()
    (longest,) = await prometheus.until('set_update_domain:caesura_pause_last_seconds:max{update_domain="0"}')
    assert 3.0 <= longest.values[0] < 8.0
    (used,) = await prometheus.until('set_update_domain:caesura_pause_budget_used:ratio{update_domain="1"}')
    assert 0.3 <= used.values[0] < 0.8
    (median,) = await prometheus.until('set_update_domain:caesura_pause_seconds:p50_1h{update_domain="0"}')
    assert 3.0 <= median.values[0] <= 5.0, "the bucket that a pause of three seconds and a little falls into"

    state = await scene.roll("broken")
    assert state.status == "halted", state.reason
    await prometheus.until('ALERTS{alertname="CaesuraRolloutHalted", alertstate="firing", update="broken"}')
    # Now nothing is excused but what no pause needed.
    excused = {part: why for part, why in ONLY_WHEN_WRONG.items() if "pause" in why}
    assert len(excused) == 2
    assert await problems(prometheus, _DASHBOARDS, since=began, rate_interval="5s", excused=excused) == []

    await _misspelt_names_are_found(prometheus, Window(began, time.time(), 1.0, "5s"))


async def _misspelt_names_are_found(prometheus: Any, window: Window) -> None:
    """The check must be able to fail: one letter wrong, in every kind of place."""
    path = next(path for path in _DASHBOARDS if path.name == "overview.json")
    text = path.read_text(encoding="utf-8")
    for right, wrong in (
        ("caesura_vms_unsynced", "caesura_vms_unsyncd"),  # sum() of nothing is nothing
        ("caesura_pause_seconds_bucket", "caesura_pause_second_bucket"),
        ("caesura_wave_started_timestamp_seconds", "caesura_wave_start_timestamp_seconds"),  # an annotation
        ("caesura_domain_wave_status", "caesura_domain_wav_status"),  # an operand of an `or`
        ("budget of {{set}}", "budget of {{sett}}"),  # a legend's label
    ):
        assert right in text
        dashboard = json.loads(text.replace(right, wrong))
        found = await dashboard_problems(prometheus, dashboard, window, ONLY_WHEN_WRONG)
        assert found, f"{wrong} was not noticed"
        named = wrong.replace("\\", "").split("{{")[-1].rstrip("}")
        assert all(named in each for each in found), found
    title = "Alerts"
    health = json.loads(next(path for path in _DASHBOARDS if path.name == "suite-health.json").read_text())
    (panel,) = [each for each in health["panels"] if each["title"] == title]
    # Without the part that makes it excusable, `or vector(0)` hides nothing.
    panel["targets"][0]["expr"] = 'count(ALERTZ{alertname=~"Caesura.+"}) or vector(0)'
    (only,) = await dashboard_problems(prometheus, health, window, ONLY_WHEN_WRONG)
    assert "ALERTZ" in only

    rules = {rule.name: rule for rule in await prometheus.rules()}
    for name in ("CaesuraTwoDomainsPaused", "CaesuraExporterDown", "set:caesura_rollout_seconds:duration"):
        wrong = msgspec.structs.replace(rules[name], expr=rules[name].expr.replace("caesura_", "caesra_"))
        assert await rule_problems(prometheus, [wrong], window, ONLY_WHEN_WRONG), name
