"""The host's inventory on the bus: whole, or in parts of which only those that changed are sent again."""

from __future__ import annotations

import structlog

from caesura.bus.port import BusError
from caesura.bus.post import Post
from caesura.contract.codec import Oversized
from caesura.contract.fitting import fitted
from caesura.contract.messages import HostInventory, InventoryPart
from caesura.contract.parts import inventory_in_parts

_log = structlog.get_logger("caesura.host.inventory")


class InventoryPublisher:
    """Publishes one host's inventory.

    Args:
        host: its name.
        post: where it is published.
    """

    def __init__(self, host: str, post: Post) -> None:
        self._host = host
        self._post = post
        self._parts: dict[int, str] = {}
        """Number of a part that the broker may have to its etag there; empty: not known."""
        self._unsent = ""

    def retained_earlier(self, part: InventoryPart) -> None:
        """The broker has this part: from an earlier run of this service, or as it was sent."""
        self._parts.setdefault(part.part, "")

    def connected(self) -> None:
        """A broker may have lost what it retained: all parts are sent again."""
        self._parts = dict.fromkeys(self._parts, "")

    def ping(self) -> str:
        """Why the inventory on the bus is not the newest one, if that will not change by itself."""
        return self._unsent

    async def publish(self, inventory: HostInventory) -> None:
        """Publish it, its parts first. What the bus does not take is published with the next one, or after a reconnect."""
        head, parts = inventory_in_parts(inventory)
        try:
            for part in parts:
                if self._parts.get(part.part) != part.etag:
                    await self._post.send(part, host=self._host, part=part.part)
                    self._parts[part.part] = part.etag
            await self._post.send(fitted(head), host=self._host)
            for number in [each for each in self._parts if each > len(parts)]:
                await self._post.clear(InventoryPart, host=self._host, part=number)
                del self._parts[number]
        except Oversized as error:
            # What was published before stays: a host without VMs would count in no fence.
            self._say_unsent(
                f"the inventory is too large even without its VMs: take updates out of updates.d ({error.why})"
            )
        except BusError:
            pass
        else:
            self._say_unsent("")

    def _say_unsent(self, why: str) -> None:
        """Said once, and in the health probe for as long as it is so."""
        if why and not self._unsent:
            _log.error("inventory.too_large", why=why)
        self._unsent = why
