"""What a contributor is offered (hooks, the inner loop) is what is required of him."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from caesura_testing.lanes import LANES, chosen

_ROOT = Path(__file__).parents[2]


def test_the_hooks_are_the_inner_loop() -> None:
    config = yaml.safe_load((_ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    assert [hook["id"] for hook in repository["hooks"]] == [name for name, lane in LANES.items() if lane.fast]
    for hook in repository["hooks"]:
        assert (hook["entry"], hook["language"]) == (f"./check {hook['id']}", "system")
        assert (hook["pass_filenames"], hook["always_run"]) == (False, True)


def test_every_lane_is_in_the_help_and_can_be_named() -> None:
    helped = subprocess.run([_ROOT / "check", "--help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  ([a-z0-9][a-z0-9-]*) {2,}\S", helped, re.MULTILINE)) == set(LANES)
    assert chosen(list(LANES), fast=False) == list(LANES)


def test_contributing_is_one_page() -> None:
    for page, most in (("CONTRIBUTING.md", 60), ("SECURITY.md", 60), ("README.md", 150)):
        assert len((_ROOT / page).read_text(encoding="utf-8").splitlines()) <= most, page
