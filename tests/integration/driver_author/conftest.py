"""The example driver is not a part of the product: it is installed, as anybody's plug-in is."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura_testing.plugins import install_driver


@pytest.fixture(autouse=True)
def example_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install`` does for an author."""
    target = "caesura_testing.example_driver:ExamplePlugin"
    monkeypatch.syspath_prepend(install_driver(tmp_path / "plugins", "example", target))
