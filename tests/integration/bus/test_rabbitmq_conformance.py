"""What the port promises, on a three-node RabbitMQ cluster with the shipped configuration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness
from caesura.conformance.buses import BusConformance
from caesura.contract.access import rabbitmq_definitions
from caesura_testing.cluster_harness import PASSWORD, USER, harness_over
from caesura_testing.rabbitmq_cluster import RabbitmqCluster, rabbitmq_server

pytestmark = pytest.mark.skipif(not rabbitmq_server(), reason="rabbitmq-server is not installed")

_MISSING = {
    BrokerCapabilities.SAY_REFUSED: "MQTT 3.1.1 has no answer for a refused publish, and RabbitMQ ends the connection",
    BrokerCapabilities.SERVE_AFTER_A_KILL: "three nodes that were killed at once accept no client for minutes after they run again: "
    "what keeps client ids has no leader",
    BrokerCapabilities.RETAIN: "each node keeps retained messages for itself, and delivers none by a wildcard",
}


def _definitions() -> str:
    """One user, who may not write below denied/."""
    made = json.loads(rabbitmq_definitions(()))
    names = {"user": USER, "vhost": "/"}
    queues = "^mqtt-subscription-.*$"
    both = "^(mqtt-subscription-.*|amq\\.topic)$"
    made["permissions"].append({**names, "configure": queues, "write": both, "read": both})
    may = {"write": "^open\\..*$", "read": "^(open|denied)(\\..*)?$"}
    made["topic_permissions"].append({**names, "exchange": "amq.topic", **may})
    return json.dumps(made)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitmqCluster]:
    folder: Path = tmp_path_factory.mktemp("rabbitmq")
    made = RabbitmqCluster(folder, _definitions(), {USER: PASSWORD})
    try:
        asyncio.run(made.start())
        yield made
    finally:
        asyncio.run(made.close())


@pytest.fixture
async def harness(cluster: RabbitmqCluster) -> AsyncIterator[BusHarness]:
    async with harness_over(cluster, missing=_MISSING) as harness:
        yield harness


class TestRabbitmq(BusConformance, missing=_MISSING):
    """The suite, without what RabbitMQ does not promise and what depends on the client alone: each of those needs a new cluster afterwards."""

    test_a_publish_in_flight_fails_as_soon_as_the_broker_dies = None  # type: ignore[assignment]
    test_who_tries_again_at_once_does_not_keep_the_end_of_the_connection_from_being_noticed = None  # type: ignore[assignment]
    test_a_publish_without_an_answer_ends_with_its_timeout = None  # type: ignore[assignment]
