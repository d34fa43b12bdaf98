"""What the host file says of each VM for its workloads: published at every connect, removed when it says nothing any more."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from caesura.bus.messaging import MessageClient
from caesura.contract.messages import VmDetails
from caesura.delivery.message import clearing, prepare
from caesura.delivery.policy import NEWEST
from caesura.delivery.publisher import ReliablePublisher
from caesura.runtime.identity import new_id
from caesura_host_updater.inventory.vm_spec import VmSpec


class VmDetailsPublisher:
    """The details of one host's VMs.

    Args:
        host: its name.
        specs: its VMs.
        post: where they are published.
    """

    def __init__(self, host: str, specs: Iterable[VmSpec], post: MessageClient) -> None:
        self._host = host
        self._source = post.source
        self._details = {
            spec.name: spec.details.message(spec.name, host) for spec in specs if spec.details is not None
        }
        # A publisher of its own: no fact waits behind the user data of a thousand VMs.
        self._publisher = ReliablePublisher(post.bus)
        self.run = self._publisher.run
        self.ping = self._publisher.ping

    @property
    def refused(self) -> int:
        """Messages that wait because the broker refuses their topic."""
        return self._publisher.refused

    def connected(self) -> None:
        """A broker may have lost what it retained: everything is published again."""
        for vm in self._details:
            self._publish(vm)

    def published_earlier(self, details: VmDetails) -> None:
        """What the broker retains: of a VM that is not here any more, or older than the host file."""
        if self._details.get(details.vm) != details:
            self._publish(details.vm)

    def _publish(self, vm: str) -> None:
        details = self._details.get(vm)
        self._publisher.put(
            clearing(VmDetails, event_id=new_id(), host=self._host, vm=vm)
            if details is None
            else prepare(
                details,
                source=self._source,
                event_id=new_id(),
                at=datetime.now(UTC),
                host=self._host,
                vm=vm,
            ),
            policy=NEWEST,
        )
