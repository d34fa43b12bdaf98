"""A coordinator takes over the lead, and with it the rollouts of one that was lost (ADR 28)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from caesura.runtime.errors import StoreError
from caesura.runtime.shared_rows import Content, SharedRows, insert, migrated
from caesura.runtime.threads import meanwhile
from caesura_coordinator.records import Rollout
from caesura_coordinator.store import MIGRATIONS, CoordinatorStore

LEFT_OUT = ("epoch", "outbox_1")
"""Tables that are not rows of the database: the epoch is in a row of its own, and the outbox of earlier versions is empty here."""
BEATS = 4
"""Signs of life in one lease."""
_HOLD_OFF_S = 300.0

T = TypeVar("T")


def hold_off_s(losses: int) -> float:
    """Seconds for which a coordinator that lost the lead so many times in a row, each time soon, leaves it to others.

    Each lead takes epochs, and hosts do not follow a leap over too many; a full disk at the database would use them up overnight.
    """
    return min(_HOLD_OFF_S, 2.0 ** (losses - 2)) if losses > 1 else 0.0


class Taken(msgspec.Struct, frozen=True):
    """The content at a take-over: a second copy of it, and the rollouts in it."""

    store: CoordinatorStore
    rollouts: list[Rollout]


def take_over(
    rows: SharedRows,
    obstacle: Callable[[int], str],
    loop: asyncio.AbstractEventLoop,
    *,
    name: str,
    lease_s: float,
) -> Taken | StoreError | None:
    """The content, if this coordinator leads now; an error if it cannot be read; None: another leads, or something is in the way.

    Runs in the thread of the session. All of it is done there, however large it is, and the session shows signs of life in the meantime.

    Args:
        rows: the session.
        obstacle: what keeps this coordinator from the lead though the store does not, given the store's epoch; called in ``loop``.
        loop: the event loop of the coordinator.
        name: of this coordinator, for people.
        lease_s: how long the database, or the event loop, may take for an answer.

    Raises:
        StoreError: the database or the event loop did not answer.
    """

    async def is_free(epoch: int) -> bool:
        return not obstacle(epoch)

    def may(epoch: int) -> bool:
        # What is in the way may have arrived since the last look, as the claim of a coordinator with another store.
        return asyncio.run_coroutine_threadsafe(is_free(epoch), loop).result(lease_s)

    def with_life(work: Callable[[], T]) -> T:
        return meanwhile("shared-store-content", work, lease_s / BEATS, rows.beat)

    try:
        content = rows.try_lead(name, may)
    except TimeoutError as error:
        raise StoreError(f"the event loop did not answer for {lease_s:g} s") from error
    if content is None:
        return None
    if content.version >= len(MIGRATIONS):
        return with_life(lambda: _read(content))
    upgraded = with_life(lambda: migrated(content, MIGRATIONS, LEFT_OUT))
    rows.rewrite(upgraded)
    return with_life(lambda: _read(upgraded))


def _read(content: Content) -> Taken | StoreError:
    """Or why it cannot be read."""
    try:
        store = CoordinatorStore(":memory:", any_thread=True)
        with store.database.transaction():
            insert(store.database, content)
            store.database.run("UPDATE epoch SET value = ?", content.epoch)
        return Taken(store=store, rollouts=store.rollouts())
    except StoreError as error:
        return error
