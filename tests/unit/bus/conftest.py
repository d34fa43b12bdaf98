from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from caesura_testing.scripted import ScriptedBroker


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    """One that says what the test tells it to."""
    async with ScriptedBroker() as broker:
        yield broker
