"""The benchmark of whole fleets runs; whether its targets are met is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from caesura_testing.broker import mosquitto_installed
from caesura_testing.patience import patient
from caesura_testing.postgresql import programs

_BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "fleet.py"


def test_whole_rollouts_over_scripted_hosts_complete() -> None:
    words = ["--vms", "40", "--vms", "80", "--domains", "2", "--per-set", "20", "--wave", "40", "--json"]
    done = subprocess.run(
        [sys.executable, str(_BENCHMARK), *words],
        capture_output=True,
        text=True,
        timeout=patient(100),
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    told = json.loads(done.stdout)
    assert [each["vms"] for each in told["fleets"]] == [40, 80]
    assert told["verdict"]["vms"] == 160
    for each in (*told["fleets"], told["verdict"]):
        # Of each VM at least its agent's answer and its clock's verdict arrived: no rollout ended before it was one.
        assert each["coordinator_messages"] > 2 * each["vms"]
        assert each["cpu_s"] > 0
        assert each["verdict_ms"] > 0


@pytest.mark.skipif(
    programs() is None or not mosquitto_installed(), reason="postgresql or mosquitto is not installed"
)
def test_a_rollout_over_a_real_broker_ends_though_its_leader_is_killed() -> None:
    words = [
        "--mosquitto",
        "--kill",
        "--vms",
        "100",
        "--domains",
        "10",
        "--per-set",
        "20",
        "--connections",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, str(_BENCHMARK), *words, "--json"],
        capture_output=True,
        text=True,
        timeout=patient(150),
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    told = json.loads(done.stdout)
    assert (told["vms"], told["hosts"], told["waves"], told["connections"]) == (100, 10, 10, 4)
    assert told["kills"] == 1
    assert told["cpu_s"] > 0
    assert 0 < told["accepted_median_s"] <= told["accepted_p99_s"]
