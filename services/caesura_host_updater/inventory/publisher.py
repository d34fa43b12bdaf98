"""The host's inventory on the bus: whole, or in parts of which only those that changed are sent again."""

from __future__ import annotations

from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusUnavailable, PublishRefused
from caesura.contract.codec import Oversized
from caesura.contract.fitting import fitted
from caesura.contract.messages import HostInventory, InventoryPart
from caesura.contract.parts import inventory_in_parts
from caesura.runtime.logs import get_logger

_log = get_logger("caesura.host.inventory")


class InventoryPublisher:
    """Publishes one host's inventory.

    Args:
        host: its name.
        post: where it is published.
    """

    def __init__(self, host: str, post: MessageClient) -> None:
        self._host = host
        self._post = post
        self._parts: dict[int, str] = {}
        """Number of a part that the broker may have, to its etag there; empty: unknown."""
        self._unsent = ""

    def retained(self, part: InventoryPart) -> bool:
        """The broker has this part: from an earlier run of this service, from somebody else, or as it was sent. Whether the inventory
        must be published again for it."""
        known = self._parts.get(part.part)
        if known == part.etag:
            return False
        self._parts[part.part] = ""
        return True

    def removed(self, part: int) -> bool:
        """The broker no longer has this part. Whether the inventory must be published again for it."""
        if part not in self._parts:
            return False
        self._parts[part] = ""
        return True

    def connected(self) -> None:
        """A broker may have lost what it retained: all parts are sent again."""
        self._parts = dict.fromkeys(self._parts, "")

    def ping(self) -> str:
        """Why the inventory on the bus is not the newest one, if that will not change by itself."""
        return self._unsent

    async def publish(self, inventory: HostInventory) -> None:
        """Publish it, its parts first. What the bus does not accept is published with the next one, or after a reconnect."""
        head, parts = inventory_in_parts(inventory)
        try:
            for part in parts:
                if self._parts.get(part.part) != part.etag:
                    await self._send(part)
            await self._post.send(fitted(head), host=self._host)
            await self._clear_beyond(len(parts))
        except Oversized as error:
            # What was published before stays: a host without VMs would count in no fence.
            self._say_unsent(
                f"the inventory is too large even without its VMs: take updates out of updates.d ({error.why})"
            )
        except PublishRefused as error:
            self._say_unsent(str(error), "inventory.refused")
        except BusUnavailable:
            pass
        else:
            self._say_unsent("")

    async def _send(self, part: InventoryPart) -> None:
        # Before it is sent: it may return, and be overwritten by another client, before the broker acknowledges it.
        self._parts[part.part] = part.etag
        try:
            await self._post.send(part, host=self._host, part=part.part)
        except Exception:
            self._parts[part.part] = ""
            raise

    async def _clear_beyond(self, last: int) -> None:
        for number in [each for each in self._parts if each > last]:
            del self._parts[number]
            try:
                await self._post.clear(InventoryPart, host=self._host, part=number)
            except PublishRefused as error:
                # Under access rules for as many VMs as there are now; that part has no reader any more.
                _log.warning("inventory.part_not_removed", part=number, why=str(error))
            except BusUnavailable:
                self._parts[number] = ""
                raise

    def _say_unsent(self, why: str, event: str = "inventory.too_large") -> None:
        """Logged once, and shown in the health probe for as long as it is true."""
        if why and not self._unsent:
            _log.error(event, why=why)
        self._unsent = why
