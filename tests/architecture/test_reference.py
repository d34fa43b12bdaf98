"""The generated reference in docs/reference: complete, and noticed when it is stale."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from caesura.runtime.settings import describe_settings
from caesura_coordinator.settings import CoordinatorSettings
from caesura_vm_agent.settings import VmAgentSettings

_ROOT = Path(__file__).parents[2]
_PAGES = _ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """``docs/generate_reference.py``; the lane ``generated`` runs it as a script."""
    spec = importlib.util.spec_from_file_location(
        "caesura_generate_reference", _ROOT / "docs/generate_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stale_region_is_named_and_writing_it_heals_it(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(_PAGES, folder)
    page = folder / "metrics.md"
    fresh = page.read_text(encoding="utf-8")
    page.write_text(fresh.replace("`caesura_pause_seconds`", "`caesura_pause_minutes`"), encoding="utf-8")
    assert generator.main(["--check", "--folder", str(folder)]) == 1
    said = capsys.readouterr().err.partition(": ")[2]
    assert "metrics" in said
    assert "settings" not in said
    assert generator.main(["--write", "--folder", str(folder)]) == 0
    assert page.read_text(encoding="utf-8") == fresh


def test_a_missing_mark_is_an_error(generator: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    shutil.copytree(_PAGES, folder)
    (folder / "settings.md").write_text("<!-- reference: settings -->\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="marks"):
        generator.main(["--check", "--folder", str(folder)])


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
