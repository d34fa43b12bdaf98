"""The metadata publisher's shell: receives documents and inventories from the bus, sends answers and approvals.

Without a document there is no 200: an incarnation invented here (0, say) could be lower than what another
publisher, or this one before its restart, has shown, and an incarnation never goes back. Clients retry the
500, and Azure's own first answer may take minutes too. So a coordinator publishes a document for every
set it knows, also while nothing is scheduled. With the bus lost, the last document is still served.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import NAMESPACE_URL, uuid5

import msgspec

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, BusError
from caesura.bus.presence import Presence
from caesura.bus.resync import Resync
from caesura.contract.codec import Received
from caesura.contract.envelope import Message, source_of
from caesura.contract.messages import (
    HostInventory,
    PublisherPresence,
    PublisherResyncRequested,
    ScheduledEvent,
    SetDocument,
    VmApproved,
    VmDetails,
    VmOwner,
)
from caesura.contract.parts import with_parts
from caesura.contract.topics import channel_of
from caesura.delivery.message import prepare
from caesura.delivery.policy import DeliveryPolicy
from caesura.delivery.publisher import ReliablePublisher
from caesura.fleet.fold import Changes
from caesura.fleet.retained_messages import Cleared
from caesura.lifecycle.document import find_event
from caesura.runtime.logs import get_logger
from caesura_metadata_publisher.api_versions import INSTANCE_VERSIONS, EventsVersion
from caesura_metadata_publisher.directory import Directory
from caesura_metadata_publisher.encoded import EncodedDocument, EncodedDocuments
from caesura_metadata_publisher.events_document import awaits_approval, unchanged
from caesura_metadata_publisher.fidelity import FirstCalls, RateLimit
from caesura_metadata_publisher.instance import answer_instance
from caesura_metadata_publisher.instance_fields import instance_tree
from caesura_metadata_publisher.listeners import Listener
from caesura_metadata_publisher.request import (
    ApproveEvents,
    HttpResponse,
    ReadEvents,
    ReadInstance,
    Request,
    service_error,
    too_many,
)
from caesura_metadata_publisher.settings import MetadataPublisherSettings

_log = get_logger("caesura.metadata")

_LATE = timedelta(seconds=5)  # after NotBefore an approval has no effect; this much for clocks that differ


def presence(instance: str, *, online: bool) -> PublisherPresence:
    """The publisher's presence, also as its last will."""
    return PublisherPresence(instance=instance, online=online)


_FILTERS_BY_VM = 256
"""The most VMs for which a publisher has filters of their own; above, one for all is less work for everybody."""


def filters(vms: Sequence[str] = ()) -> tuple[str, ...]:
    """What a publisher subscribes to.

    Args:
        vms: the VMs that it serves; none: any. Some brokers refuse a filter for all to whom only some are allowed.
    """
    of_all = tuple(channel_of(kind).filter() for kind in with_parts((SetDocument, HostInventory)))
    of_each = [channel_of(kind) for kind in (VmOwner, VmDetails)]
    if not vms or len(vms) > _FILTERS_BY_VM:
        return (*of_all, *(channel.filter() for channel in of_each))
    return (*of_all, *(channel.filter(vm=vm) for vm in dict.fromkeys(vms) for channel in of_each))


class MetadataPublisher:
    """Answers the requests of VMs. Nothing is persisted: all it needs is retained on the bus."""

    def __init__(self, settings: MetadataPublisherSettings, bus: Bus) -> None:
        self._settings = settings
        self._bus = bus
        self._post = MessageClient(bus, source_of(settings.fleet, "metadata", settings.instance))
        self._post.subscribe(SetDocument, self._on_document)
        self._post.subscribe(HostInventory, self._on_inventory)
        self._post.on_tombstone(HostInventory, self._on_host_removed)
        self._post.subscribe(VmOwner, self._on_owner)
        self._post.on_tombstone(VmOwner, self._on_owner_removed)
        self._post.subscribe(VmDetails, self._on_details)
        self._post.on_tombstone(VmDetails, self._on_details_removed)
        self._directory = Directory()
        self._encoded = EncodedDocuments()
        self._approvals = ReliablePublisher(bus)
        self._presence = Presence(
            self._post,
            partial(presence, settings.instance, online=True),
            partial(presence, settings.instance, online=False),
            instance=settings.instance,
        )
        self._resync = Resync(
            self._post,
            enabled=settings.broker_retained == "ignored",
            request=lambda: PublisherResyncRequested(instance=settings.instance),
            publish=self._announce,
            instance=settings.instance,
        )
        self.run_resync = self._resync.run
        self.run_approvals = self._approvals.run
        self.run_presence = self._presence.run
        strict = settings.fidelity == "strict"
        self._rate_limit = RateLimit() if strict else None
        self._first_calls = FirstCalls(settings.first_answer_s) if strict else None
        self._pending: set[str] = set()
        """Events whose approval was published and is not shown by the document yet."""
        self.answers: Counter[tuple[str, str, int]] = Counter()
        """(endpoint, method, status) to how often."""
        self.approvals = 0
        """Approvals accepted from workloads and published."""

    @property
    def pending(self) -> int:
        """Approvals that the document does not show yet."""
        return len(self._pending)

    @property
    def decode_errors(self) -> Counter[str]:
        """Messages that broke the contract, by kind."""
        return self._post.decode_errors

    def broker_ping(self) -> str:
        """For /ready."""
        stats = self._bus.stats
        return "" if stats.connected else f"not connected: {stats.last_error or 'still trying'}"

    def documents_ping(self, listeners: tuple[Listener, ...]) -> str:
        """For /ready: whether every VM that may ask can be answered."""
        missing = sorted({each.vm for each in listeners if isinstance(self._document(each.vm), HttpResponse)})
        return f"no document yet for {', '.join(missing)}" if missing else ""

    def shown(self, set_name: str) -> SetDocument | None:
        """The document that the VMs of the set are shown, None if none is known."""
        return self._directory.document(set_name)

    # -- tasks --------------------------------------------------------------------------------------------

    async def run_bus(self) -> None:
        """Keep the connection; deliver."""
        await self._bus.run(self._post.deliver, self.publish_state)

    async def publish_state(self) -> None:
        """The retained presence, after every (re)connect."""
        self._resync.connected()
        await self._announce()

    async def _announce(self) -> None:
        await self._presence.announce()

    async def drain(self) -> None:
        """Announce offline and leave the bus."""
        await self._presence.goodbye(timeout_s=1.0)
        await self._bus.close()

    # -- from the bus -------------------------------------------------------------------------------------

    async def _on_document(self, document: SetDocument, _: Received) -> None:
        known = self._directory.document(document.set)
        if self._take(document).word:
            _log.debug("document.taken", set=document.set, incarnation=document.incarnation)
        elif known is not None and document.incarnation < known.incarnation:
            _log.warning(
                "document.older_ignored",
                set=document.set,
                incarnation=document.incarnation,
                shown=known.incarnation,
                advice="a lower incarnation means that the coordinator lost its store, or that a broker was restored",
            )

    async def _on_inventory(self, inventory: HostInventory, _: Received) -> None:
        self._take(inventory)

    async def _on_host_removed(self, parameters: Mapping[str, str]) -> None:
        self._take(Cleared(HostInventory, parameters))

    async def _on_owner(self, owner: VmOwner, _: Received) -> None:
        self._take(owner)

    async def _on_owner_removed(self, parameters: Mapping[str, str]) -> None:
        self._take(Cleared(VmOwner, parameters))

    async def _on_details(self, details: VmDetails, _: Received) -> None:
        self._take(details)

    async def _on_details_removed(self, parameters: Mapping[str, str]) -> None:
        self._take(Cleared(VmDetails, parameters))

    def _take(self, message: Message | Cleared) -> Changes:
        return self._directory.take(message, asyncio.get_running_loop().time())

    # -- from the workloads -------------------------------------------------------------------------------

    async def answer(self, listener: Listener, request: Request) -> HttpResponse:
        """The answer to a well-formed request that came in at ``listener``."""
        if isinstance(request, ReadEvents):
            await self._until_switched_on(listener.vm)
            return self._read_events(listener.vm, request)
        if isinstance(request, ApproveEvents):
            return await self._approve(listener.vm, request)
        if isinstance(request, ReadInstance):
            placed = self._directory.vm(listener.vm)
            if placed is None:
                return self._unknown(listener.vm)
            details = self._directory.details(placed)
            tree = instance_tree(placed, details, request.version, self._settings.place)
            return answer_instance(tree, request.path, request.format)
        oldest_first = sorted(INSTANCE_VERSIONS)
        return HttpResponse(status=200, body=msgspec.json.encode({"apiVersions": oldest_first}))

    def refuses(self, vm: str) -> HttpResponse | None:
        """The answer to a request beyond the limit; None: it is served. Ask once for each request of a VM."""
        if self._rate_limit is None or self._rate_limit.allows(vm, asyncio.get_running_loop().time()):
            return None
        return too_many()

    async def _until_switched_on(self, vm: str) -> None:
        placed = self._directory.vm(vm)
        if self._first_calls is not None and placed is not None:
            wait_s = self._first_calls.called(placed.record.set, asyncio.get_running_loop().time())
            if wait_s:
                _log.info(
                    "events.first_call", vm=vm, set=placed.record.set, answered_after_s=round(wait_s, 3)
                )
                await asyncio.sleep(wait_s)

    def _read_events(self, vm: str, request: ReadEvents) -> HttpResponse:
        document = self._document(vm)
        if isinstance(document, HttpResponse):
            return document
        encoded = self._encoded.of(document, request.version)
        if request.if_none_match and unchanged(request.if_none_match, encoded.etag):
            return HttpResponse(status=304, headers={"ETag": encoded.etag})
        return HttpResponse(status=200, body=encoded.body, headers={"ETag": encoded.etag})

    def polled(self, vm: str, version: EventsVersion) -> EncodedDocument | None:
        """The document that a GET of events gets at once; None: it has to be asked for by ``answer``."""
        if self._rate_limit is not None:
            return None
        placed = self._directory.vm(vm)
        document = self._directory.document(placed.record.set) if placed is not None else None
        return self._encoded.of(document, version) if document is not None else None

    async def _approve(self, vm: str, request: ApproveEvents) -> HttpResponse:
        document = self._document(vm)
        if isinstance(document, HttpResponse):
            return document
        found = (find_event(document, event_id) for event_id in request.event_ids)
        # Unknown, started or approved already: 200 and no change, also when another VM approved it.
        wanted = {
            event.event_id: event
            for event in found
            if event is not None and awaits_approval(event) and event.event_id not in self._pending
        }
        # At once: together they take as long as one may.
        passed = await asyncio.gather(*(self._pass_on(document.set, vm, event) for event in wanted.values()))
        for event_id, accepted in zip(wanted, passed, strict=True):
            if accepted:
                self.approvals += 1
                _log.info("approval.accepted", vm=vm, set=document.set, event_id=event_id)
        return (
            HttpResponse(status=200) if all(passed) else service_error("The approval could not be passed on.")
        )

    async def _pass_on(self, set_name: str, vm: str, event: ScheduledEvent) -> bool:
        """Whether the broker has it. From then on it is repeated until the document shows it: publishing it proves nothing."""
        approved = VmApproved(event_id=event.event_id, set=set_name, vm=vm, at=datetime.now(UTC))
        message = prepare(
            approved,
            source=self._post.source,
            # The same id on every repetition, so that readers count one approval.
            event_id=str(uuid5(NAMESPACE_URL, f"caesura/approval/{event.event_id}/{vm}")),
            at=approved.at,
            instance=self._settings.instance,
            vm=vm,
        )
        policy = DeliveryPolicy(
            give_up_s=self._settings.approval_timeout_s,
            refusal_ends=True,
            repeat_s=self._settings.approval_repeat_s,
            wanted=partial(self._still_wanted, set_name, event),
        )
        try:
            await self._approvals.deliver(message, policy)
        except BusError as error:
            _log.warning("approval.refused", vm=vm, event_id=event.event_id, why=str(error))
            return False
        return True

    def _still_wanted(self, set_name: str, event: ScheduledEvent) -> bool:
        """Whether the document does not show the approval yet, and it is not too late for it."""
        document = self._directory.document(set_name)
        shown = find_event(document, event.event_id) if document else None
        wanted = awaits_approval(shown) and datetime.now(UTC) < event.not_before + _LATE
        if wanted:
            self._pending.add(event.event_id)
        else:
            self._pending.discard(event.event_id)
        return wanted

    def _document(self, vm: str) -> SetDocument | HttpResponse:
        placed = self._directory.vm(vm)
        if placed is None:
            return self._unknown(vm)
        document = self._directory.document(placed.record.set)
        if document is None:
            return service_error(f"The events of set {placed.record.set} are not known yet.")
        return document

    def _unknown(self, vm: str) -> HttpResponse:
        if self._bus.stats.connects == 0:
            return service_error("The message bus was not reached yet.")
        if rivals := self._directory.foreign_hosts(vm):
            return service_error(f"VM {vm} is not on record as one of {', '.join(rivals)}.")
        return service_error(f"No host has spoken of VM {vm} yet.")
