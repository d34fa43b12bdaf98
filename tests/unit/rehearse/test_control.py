"""The control API's description and its file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from caesura_rehearse.control.api import OPENAPI_FILE, control_app
from caesura_rehearse.control.file import ControlAddress, NoRehearsal, find_control, folder_of_controls
from caesura_rehearse.control.openapi import description, text


def test_the_openapi_file_is_fresh() -> None:
    assert OPENAPI_FILE.read_text(encoding="utf-8") == text(), (
        "write it again: python -m caesura_rehearse.control.openapi >tools/caesura_rehearse/control/openapi.json"
    )


def test_it_describes_every_route_and_no_other() -> None:
    app = control_app(None, "token")  # type: ignore[arg-type]
    routes = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {
        (method.upper(), path)
        for path, item in description()["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert routes == described | {("GET", "/openapi.json")}


def test_every_reference_leads_somewhere() -> None:
    whole = description()
    for reference in re.findall(r'"#/([^"]+)"', json.dumps(whole)):
        found: Any = whole
        for name in reference.split("/"):
            found = found[name]


@pytest.fixture
def controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return folder_of_controls()


def _file(folder: Path, name: str, pid: int) -> Path:
    path = folder / f"{name}.json"
    path.write_bytes(ControlAddress(url=f"http://127.0.0.1:1/{name}", token="t", pid=pid).to_json())  # noqa: S106 - none
    return path


def test_the_only_rehearsal_is_found(controls: Path) -> None:
    with pytest.raises(NoRehearsal, match="no rehearsal runs here"):
        find_control(None)
    killed = _file(controls, "killed", 4194304 + 1)
    one = _file(controls, "one", os.getpid())
    assert find_control(None).url.endswith("/one")
    assert not killed.exists(), "of one that was killed"
    other = _file(controls, "other", os.getpid())
    with pytest.raises(NoRehearsal, match="several rehearsals run"):
        find_control(None)
    assert find_control(other).url.endswith("/other")
    one.unlink()


def test_a_folder_that_others_may_write_to_is_not_used(controls: Path) -> None:
    controls.chmod(0o777)
    with pytest.raises(PermissionError, match="not a private folder"):
        folder_of_controls()
    with pytest.raises(NoRehearsal, match="cannot look"):
        find_control(None)


def test_one_that_does_not_answer() -> None:
    with pytest.raises(NoRehearsal, match="does not answer"):
        ControlAddress(url="http://127.0.0.1:1", token="t", pid=1).call("GET", "/v1/state")  # noqa: S106 - none
