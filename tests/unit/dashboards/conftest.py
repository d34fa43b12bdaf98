"""The dashboards as they are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "grafana" / "dashboards"


@pytest.fixture(params=sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> Any:
    """Each dashboard."""
    return json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture
def dashboards() -> dict[str, Any]:
    """File name to dashboard."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
