"""The generated reference in docs/reference: complete, and noticed when it is stale."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from caesura.runtime.settings import describe_settings
from caesura_coordinator.settings import CoordinatorSettings
from caesura_vm_agent.settings import VmAgentSettings

_ROOT = Path(__file__).parents[2]
_PAGES = _ROOT / "docs" / "reference"


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(_ROOT / "docs" / "generate_reference.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_a_stale_region_is_named_and_writing_it_heals_it(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(_PAGES, folder)
    page = folder / "metrics.md"
    fresh = page.read_text(encoding="utf-8")
    page.write_text(fresh.replace("`caesura_pause_seconds`", "`caesura_pause_minutes`"), encoding="utf-8")
    stale = generate("--check", "--folder", str(folder))
    assert stale.returncode == 1
    assert "stale" in stale.stderr
    assert "metrics" in stale.stderr
    assert "settings" not in stale.stderr
    assert generate("--write", "--folder", str(folder)).returncode == 0
    assert page.read_text(encoding="utf-8") == fresh


def test_a_missing_mark_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(_PAGES, folder)
    (folder / "settings.md").write_text("<!-- reference: settings -->\n", encoding="utf-8")
    done = generate("--check", "--folder", str(folder))
    assert done.returncode == 1
    assert "marks" in done.stderr


def test_every_setting_of_its_own_is_listed_by_its_full_name() -> None:
    page = (_PAGES / "settings.md").read_text(encoding="utf-8")
    for settings, prefix in (
        (CoordinatorSettings, "CAESURA_COORDINATOR_"),
        (VmAgentSettings, "CAESURA_VM_AGENT_"),
    ):
        own = [
            row
            for row in describe_settings(settings, prefix)
            if not row[0].endswith("_FLEET") and "_BROKER_" not in row[0] and "_LOG_" not in row[0]
        ]
        for name, _, _ in own:
            if not name.endswith("_HEALTH_LISTEN"):
                assert f"| `{name}` |" in page
