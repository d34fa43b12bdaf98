"""The store that several coordinators share: a working copy in memory, whose rows are written to the database behind it (ADR 28).

The same coordinator in another part: it stands by until it gets the lock, then it has the content (``takeover``) and may write, until its
session ends. Nothing that it committed leaves the process before the database has it, so what a leader that is replaced had decided and not stored has never happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from caesura.delivery.sqlite_outbox import OffLoop, OutboxTable
from caesura.runtime.errors import ConfigError, StoreError
from caesura.runtime.logs import get_logger
from caesura.runtime.shared_rows import SharedRows, StoreLost, WorkingCopy
from caesura.runtime.threads import Worker
from caesura_coordinator.records import Rollout
from caesura_coordinator.store import CoordinatorStore
from caesura_coordinator.takeover import BEATS, LEFT_OUT, Taken, take_over

_POLL_S = 0.25
_RETRY_S = 1.0
_SLOW_S = 1.0
"""s: without an answer of the database, after which the coordinator says that it waits."""
_STEADY_S = 60.0
"""s: who led so long starts to count its losses again."""
ANOTHER_LEADS = "another coordinator leads"

T = TypeVar("T")
_log = get_logger("caesura.coordinator")


def working_copy() -> tuple[CoordinatorStore, WorkingCopy]:
    """An empty store in memory, and what knows its changes."""
    store = CoordinatorStore(":memory:")
    return store, WorkingCopy(store.database, LEFT_OUT)


class SharedStore:
    """The commits of a working copy, and whether this coordinator leads. See the module and ``DurableCommits``.

    Args:
        store: the working copy.
        copy: its changes.
        rows: makes a connection to the database: another one is made when the thread of the first hangs.
        name: of this coordinator, for people.
        lease_s: how long the database may take for an answer.
        poll_s: seconds between two tries of a standby to lead: a take-over takes up to so much longer.
        retry_s: seconds before the next try to reach a database that was not reached.
        hold_off_s: seconds before the first try to lead.
    """

    def __init__(
        self,
        store: CoordinatorStore,
        copy: WorkingCopy,
        rows: Callable[[], SharedRows],
        *,
        name: str,
        lease_s: float,
        poll_s: float = _POLL_S,
        retry_s: float = _RETRY_S,
        hold_off_s: float = 0.0,
    ) -> None:
        self.store = store
        self.lease_s = lease_s
        self.listeners: list[Callable[[], None]] = []
        """See ``DurableCommits``."""
        self.leads = False
        """Whether the content is here and nothing shows that another leads."""
        self.waits_for = "the store"
        """What this coordinator waits for; empty: for nothing."""
        self.writes = 0
        """The number of transactions in the database."""
        self._copy = copy
        self._make_rows = rows
        self._rows = rows()
        store.database.path = self._rows.label
        self._name = name
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._hold_off_s = hold_off_s
        self._leads_since: float | None = None
        """Loop time."""
        self._worker = Worker("shared-store")
        self._on_disk = store.database.commits
        self._round: asyncio.Task[None] | None = None
        self._failed: StoreLost | None = None
        self._wake = asyncio.Event()
        self._asked_s: list[float] = []
        """Loop time of each question that the database has not answered."""

    # -- election ------------------------------------------------------------------------------------------

    async def lead(self, obstacle: Callable[[int], str] = lambda _: "") -> list[Rollout]:
        """Stand by until this coordinator leads; then the working copy has the content. Returns its rollouts.

        Args:
            obstacle: what keeps this coordinator from the lead though the store does not, given the store's epoch; empty: nothing.

        Raises:
            ConfigError, NewerStore: the database must not be used.
            StoreLost: it was lost at once.
            StoreError: the content cannot be read.
        """
        if self._hold_off_s:
            self._now_waits_for(f"its next try in {self._hold_off_s:g} s: it lost the lead again and again")
            await asyncio.sleep(self._hold_off_s)
        while True:
            try:
                why = obstacle(await self._do(self._rows.open))
                taken = None if why else await self._do(self._take_over(obstacle), lasting=True)
            except StoreError as error:
                await self._not_reached(error)
                continue
            if taken is not None:
                break
            self._now_waits_for(why or ANOTHER_LEADS)
            await asyncio.sleep(self._poll_s)
        if isinstance(taken, StoreError):
            raise taken
        self._copy.fill(taken.store.database)
        taken.store.database.close()
        self._on_disk = self.store.database.commits
        self._now_waits_for("")
        self.leads = True
        self._leads_since = asyncio.get_running_loop().time()
        return taken.rollouts

    def _take_over(self, obstacle: Callable[[int], str]) -> Callable[[], Taken | StoreError | None]:
        rows, loop = self._rows, asyncio.get_running_loop()
        return lambda: take_over(rows, obstacle, loop, name=self._name, lease_s=self.lease_s)

    async def _not_reached(self, error: StoreError) -> None:
        if error.exit_code == ConfigError.exit_code:
            raise error  # a newer version's
        if self.waits_for != str(error):
            _log.error("store.not_reached", why=str(error))
        self._now_waits_for(str(error))
        await asyncio.sleep(self._retry_s)

    def _now_waits_for(self, what: str) -> None:
        if what != self.waits_for:
            self.waits_for = what
            _log.info(
                "coordinator.waits" if what else "coordinator.leads", store=self._rows.label, waits_for=what
            )

    @property
    def bus(self) -> str:
        """Where the last leader announced itself; empty: not known."""
        return self._rows.bus

    async def led_on(self, bus: str) -> None:
        """Note on which bus this leader has announced itself. Raises StoreLost."""
        try:
            await self._do(lambda: self._rows.led_on(bus))
        except StoreError as error:
            raise self._lost(error) from error

    # -- commits -------------------------------------------------------------------------------------------

    @property
    def on_disk(self) -> int:
        """See ``DurableCommits``."""
        return self._on_disk

    @property
    def committed(self) -> int:
        """See ``DurableCommits``."""
        return self.store.database.commits

    @property
    def lost(self) -> bool:
        """Whether this coordinator begins again as a standby."""
        return self._failed is not None

    @property
    def steady(self) -> bool:
        """Whether it led for long enough not to count as lost at once."""
        now_s = asyncio.get_running_loop().time()
        return self._leads_since is not None and now_s - self._leads_since > _STEADY_S

    @property
    def settled(self) -> bool:
        """See ``DurableCommits``."""
        return self._on_disk >= self.committed

    async def reached(self) -> int:
        """See ``DurableCommits``."""
        wanted = self.committed
        while self._on_disk < wanted:
            await asyncio.shield(self.start())
        return self._on_disk

    def start(self) -> asyncio.Task[None]:
        """See ``DurableCommits``."""
        if self._failed is not None:
            raise self._failed
        if self._round is None:
            self._round = asyncio.create_task(self._write(), name="store-write")
        return self._round

    async def writable(self) -> None:
        """See ``DurableCommits``: a commit never waits here."""

    async def run(self) -> None:
        """Keep the session alive, and write what nobody waits for, until cancelled.

        Raises:
            StoreLost: the session ended, or the database did not answer within the lease.
        """
        try:
            while True:
                try:
                    async with asyncio.timeout(self.lease_s / BEATS):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                if self._failed is not None:
                    raise self._failed
                if not self.leads:
                    continue
                if not self.settled:
                    await self.reached()
                elif self._round is None:
                    try:
                        await self._do(self._rows.beat)
                    except StoreError as error:
                        raise self._lost(error) from error
        finally:
            self.leads = False
            self._worker.post(self._rows.close)
            self._worker.end()

    def close(self) -> None:
        """See ``DurableCommits``. The database has everything that it will have."""
        self.leads = False
        self.store.database.close()

    def ping(self) -> str:
        """See ``DurableCommits``. A standby that only waits for its turn is well."""
        return "" if self.waits_for == ANOTHER_LEADS else self.waiting()

    def waiting(self) -> str:
        """What this coordinator waits for now; empty: for nothing."""
        if self.waits_for or self._failed is not None:
            return self.waits_for or str(self._failed)
        now_s = asyncio.get_running_loop().time()
        waited_s = now_s - min(self._asked_s, default=now_s)
        return (
            f"the store {self._rows.label}, which has not answered for {waited_s:.0f} s"
            if waited_s >= _SLOW_S
            else ""
        )

    def off_loop(self) -> OffLoop:
        """Work on the outbox: in the working copy, where nothing waits."""

        async def on_copy(work: Callable[[OutboxTable], T]) -> T:
            done = work(self.store.outbox)
            if not self.settled:
                self._wake.set()
            return done

        return on_copy

    async def _write(self) -> None:
        covered = self.committed
        try:
            changes = self._copy.take()
            epoch = self.store.epoch()
            await self._do(lambda: self._rows.write(epoch, changes))
        except StoreError as error:
            self._lost(error)  # who waits looks again, and raises it then
            return
        finally:
            self._round = None
        self.writes += 1
        if covered > self._on_disk:
            self._on_disk = covered
            for each in self.listeners:
                each()

    async def _do(self, work: Callable[[], T], *, lasting: bool = False) -> T:
        """What ``work`` returns, from the thread. If it takes longer than the lease, the thread is left alone.

        Args:
            work: uses the session.
            lasting: it may take longer, as long as the database gives answers.

        Raises:
            StoreError: as ``work``, or no answer in time.
        """
        began_s = asyncio.get_running_loop().time()
        self._asked_s.append(began_s)
        rows, running = self._rows, asyncio.ensure_future(self._worker.do(work))
        try:
            while True:
                answers = rows.answers
                done, _ = await asyncio.wait({running}, timeout=self.lease_s)
                if done:
                    return await running
                if not lasting or rows.answers == answers:
                    break
            # The thread may continue some day: then it ends its session.
            self._worker.post(rows.close)
            self._worker.end()
            self._rows = self._make_rows()
            error = StoreError(f"no answer of {rows.label} for {self.lease_s:g} s")
            error.temporary = True
            raise error
        finally:
            running.cancel()
            self._asked_s.remove(began_s)

    def _lost(self, error: StoreError) -> StoreLost:
        self.leads = False
        if self._failed is None:
            self._failed = StoreLost(self._rows.label, error)
            self._wake.set()
        return self._failed
