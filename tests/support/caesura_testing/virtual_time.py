"""Looptime for the tests that are marked with it, and for no others.

Its hook looks for event loops among the values of all fixtures of all tests, which is a quarter of what a small test takes.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

_NAME = "looptime_plugin"


class LooptimeWhereMarked:
    """Calls the hooks of ``plugin`` for a test that has the marker ``looptime``."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        if request.node.get_closest_marker("looptime") is None:
            return (yield)
        return (yield from self._plugin.pytest_fixture_setup(fixturedef, request))

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
        if pyfuncitem.get_closest_marker("looptime") is None:
            return (yield)
        return (yield from self._plugin.pytest_pyfunc_call(pyfuncitem))


def only_where_marked(config: pytest.Config) -> None:
    """Put ``LooptimeWhereMarked`` in the place of the plugin, where it is installed and not blocked."""
    manager = config.pluginmanager
    if (plugin := manager.get_plugin(_NAME)) is not None:
        manager.unregister(name=_NAME)
        manager.register(LooptimeWhereMarked(plugin), f"{_NAME}_where_marked")
