"""The coordinator's epoch that this host obeys: durable before anything is done under it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from caesura.contract.messages import CoordinatorPresence
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura.runtime.errors import StoreError
from caesura.runtime.logs import get_logger
from caesura_host_updater.epoch_authority import EpochAuthority, NotObeyed, observe_epoch
from caesura_host_updater.journal import Journal, JournalThread

FORGET_ADVICE = "see 'An epoch that nobody claimed' in docs/operate/runbooks/epoch.md"

_log = get_logger("caesura.host_updater")


class EpochTracker:
    """See the module.

    Args:
        changed: called when the inventory has something new to say of it.
    """

    def __init__(self, journal: JournalThread, changed: Callable[[], None]) -> None:
        self._journal = journal
        self._changed = changed
        self.authority = EpochAuthority()
        self.refused = ""
        """Why the newest epoch is not obeyed; empty when it is."""
        self._outdated = ""
        """The coordinator that is refused because this host would not receive its commands."""

    async def load(self) -> None:
        """Load the epoch that a previous run obeyed. Raises StoreError."""
        self.authority = await self._journal.do(Journal.authority)

    async def observe(
        self, epoch: int, coordinator: str, commands: Collection[str] = COMMANDS
    ) -> EpochAuthority | NotObeyed:
        """Obey a newer epoch, durably, before anything else. Raises StoreError."""
        observed = observe_epoch(self.authority, epoch, coordinator, commands)
        outdated = isinstance(observed, NotObeyed) and observed.outdated
        refused = (
            observed.why
            if isinstance(observed, NotObeyed) and (outdated or epoch > self.authority.epoch)
            else ""
        )
        if refused != self.refused and (refused or isinstance(observed, EpochAuthority)):
            self.refused = refused
            self._outdated = coordinator if outdated else ""
            self._changed()
            if outdated:
                _log.error("coordinator.outdated", why=refused)
            elif refused:
                _log.error("epoch.refused", why=refused, advice=FORGET_ADVICE)
        if isinstance(observed, EpochAuthority) and observed != self.authority:
            await self._journal.do(lambda journal: journal.obey(observed))
            self.authority = observed
            self._changed()
            _log.info("epoch.adopted", epoch=epoch, coordinator=coordinator)
        return observed

    async def on_coordinator(self, message: CoordinatorPresence) -> None:
        """A coordinator announced itself; a disk that refuses is logged, the announcement is retained on the bus."""
        if not message.online:
            return
        try:
            await self.observe(message.epoch, message.coordinator, message.commands)
        except StoreError as error:
            _log.error("epoch.not_adopted", epoch=message.epoch, why=str(error))

    @property
    def acknowledged(self) -> EpochAuthority:
        """What a coordinator's fence gets. One that was obeyed before this host was upgraded must see that it no longer is."""
        if self._outdated and self._outdated == self.authority.coordinator:
            return EpochAuthority(self.authority.epoch)
        return self.authority
