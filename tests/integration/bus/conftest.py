from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from caesura.conformance.bus_harness import BusHarness
from caesura_testing.broker import Certificates, make_certificates, mosquitto_installed
from caesura_testing.harness import KINDS, harness_of


@pytest.fixture(params=KINDS)
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BusHarness]:
    """Every kind of bus in turn."""
    if request.param.startswith("mosquitto") and not mosquitto_installed():
        pytest.skip("mosquitto is not installed")
    async with harness_of(request.param, tmp_path) as harness:
        yield harness


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority, and a certificate for localhost."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def other_certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that nobody trusts, and a certificate for another name."""
    return make_certificates(tmp_path_factory.mktemp("other"), name="elsewhere")
