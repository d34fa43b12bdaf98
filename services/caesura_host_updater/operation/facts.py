"""The facts of a host as messages: each with an id that is derived from its content, so that a repeated one is known."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from caesura.contract.envelope import Message, source_of
from caesura.contract.messages import OperationReported, VmClockSynced, VmFrozen, VmResumed
from caesura.contract.parts import report_in_parts
from caesura.delivery.message import OutboxMessage, prepare


class FactFactory:
    """Encodes the facts of this host. Their ids are derived from their content, so the same fact has the same id."""

    def __init__(self, host: str, fleet: str = "default") -> None:
        self._host = host
        self._source = source_of(fleet, "host", host)

    def report(self, report: OperationReported) -> tuple[OutboxMessage, ...]:
        """The report of an operation, after its parts where it does not fit into one message."""
        head, parts = report_in_parts(report)
        return (
            *(
                self._message(part, f"{report.status}-{part.part}", report.operation, {"part": part.part})
                for part in parts
            ),
            self._message(head, report.status, report.operation, {}),
        )

    def fact(self, fact: VmFrozen | VmResumed | VmClockSynced) -> OutboxMessage:
        """A fact about one VM."""
        # The VM's placement when it was paused: by now it may be in another set, or not on this host any more.
        of_vm: dict[str, str | int] = {"set": fact.set, "ud": fact.update_domain, "vm": fact.vm}
        return self._message(fact, fact.TYPE, fact.operation, of_vm)

    def _message(
        self, message: Message, kind: str, operation: str, of_vm: Mapping[str, str | int]
    ) -> OutboxMessage:
        name = f"{self._host}/{operation}/{kind}/{of_vm.get('vm', '')}"
        event_id = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
        now = datetime.now(UTC)
        return prepare(message, source=self._source, event_id=event_id, at=now, host=self._host, **of_vm)
