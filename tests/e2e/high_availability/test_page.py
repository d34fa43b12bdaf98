"""What docs/operate/high-availability.md has a new user do."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from caesura_testing.patience import patient
from caesura_testing.postgresql import programs


def test_a_new_user_sees_a_rollout_continue_after_its_leader_was_killed() -> None:
    if programs() is None:
        pytest.skip("postgresql is not installed (on Debian: apt-get install postgresql)")
    # What deploy/try-high-availability.sh runs, once it has the environment that this test runs in.
    done = subprocess.run(
        [sys.executable, "-m", "caesura_testing.high_availability"],
        capture_output=True,
        text=True,
        timeout=patient(180),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    leader = re.search(r"(\S+) leads, (\S+) stands by", done.stdout)
    assert leader is not None
    assert f"{leader[2]} leads, " in done.stdout.split("killing")[1]
    assert re.search(r"rollout \S+: completed", done.stdout)
    assert done.stdout.count("says the kernel") == 2
