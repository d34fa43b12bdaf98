"""What the port promises, on a three-node RabbitMQ cluster with the shipped configuration."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest

from caesura.conformance.bus_harness import BrokerCapabilities, BusHarness
from caesura.contract.access import rabbitmq_definitions
from caesura_testing.cluster_harness import PASSWORD, USER, ClusterConformance, harness_over, started
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
    folder = tmp_path_factory.mktemp("rabbitmq")
    with started(RabbitmqCluster(folder, _definitions(), {USER: PASSWORD})) as cluster:
        yield cluster


@pytest.fixture
async def harness(cluster: RabbitmqCluster) -> AsyncIterator[BusHarness]:
    async with harness_over(cluster, missing=_MISSING) as harness:
        yield harness


class TestRabbitmq(ClusterConformance, missing=_MISSING):
    """The suite, without what RabbitMQ does not promise."""
