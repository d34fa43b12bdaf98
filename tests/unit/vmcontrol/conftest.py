"""A libvirt daemon that answers as it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from caesura_testing.libvirt_answers import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """With one domain that is paused, web-1."""
    made = Daemon(tmp_path / "s")
    yield made
    made.close()
