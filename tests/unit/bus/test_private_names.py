"""An upgrade of aiomqtt or paho fails here, by the name that is gone, and not in the field (ADR 19)."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import aiomqtt
import paho.mqtt.client as paho
import pytest

from caesura.bus import mqtt_connection

_ROOT = Path(__file__).parents[3]
_TREE = ast.parse(inspect.getsource(mqtt_connection.MqttConnection))


def _attributes(of: str) -> Iterator[str]:
    """Names that are read or written on the expression ``of``."""
    for node in ast.walk(_TREE):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == of:
            yield node.attr


def _own() -> set[str]:
    """What the class itself defines: its methods, and what it stores on itself."""
    methods = {
        each.name for each in ast.walk(_TREE) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    stored = {
        node.attr
        for node in ast.walk(_TREE)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    return methods | stored


def _private(names: Iterable[str]) -> list[str]:
    return sorted({each for each in names if each.startswith("_") and not each.startswith("__")})


_THEIRS = _private(set(_attributes("self")) - _own())
_PAHO = _private(_attributes("self._client"))


def test_versions_are_the_ones_that_this_was_written_for() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(each.split("==") for each in project["dependencies"] if "==" in each)
    for name in ("aiomqtt", "paho-mqtt"):
        assert importlib.metadata.version(name) == pinned[name], name


@pytest.fixture
async def client() -> aiomqtt.Client:
    return aiomqtt.Client("127.0.0.1")


@pytest.mark.parametrize("name", _THEIRS)
async def test_aiomqtt_has_it(name: str, client: aiomqtt.Client) -> None:
    assert hasattr(client, name), f"aiomqtt.Client.{name} is gone: see shared/caesura/bus/mqtt_connection.py"


@pytest.mark.parametrize("name", _PAHO)
async def test_paho_has_it(name: str, client: aiomqtt.Client) -> None:
    found = client._client
    assert isinstance(found, paho.Client)
    assert hasattr(found, name), f"paho's Client.{name} is gone: see shared/caesura/bus/mqtt_connection.py"


def test_the_names_are_found() -> None:
    """An empty list would test nothing."""
    assert "_client" in _THEIRS
    assert {"_sock_recv", "_create_socket", "_sock_close", "_in_packet", "_ping_t"} <= set(_PAHO)
