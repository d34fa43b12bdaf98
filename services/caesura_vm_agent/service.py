"""The VM agent's shell: feeds documents and resumes to ``readiness``, runs hooks and clock-syncs, publishes the results.

Handlers only decide and queue, so an answer of a clock-sync never waits behind a hook. Hooks run one after
the other, in a task of their own; clock-syncs in another.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping

import msgspec

from caesura.bus.messaging import MessageClient
from caesura.bus.port import Bus, Delivery
from caesura.bus.resync import Resync
from caesura.contract.codec import Received
from caesura.contract.envelope import source_of
from caesura.contract.messages import (
    AgentClockSynced,
    AgentResyncRequested,
    ClockSyncAnswered,
    ClockSyncRequested,
    HookFinished,
    SetDocument,
    VmOwner,
    VmResumed,
)
from caesura.contract.topics import channel_of
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_vm_agent import readiness
from caesura_vm_agent.binding import HostBinding
from caesura_vm_agent.canary_keeper import CanaryKeeper
from caesura_vm_agent.clock_sync import ClockSync, Trigger
from caesura_vm_agent.guest_clock import GuestClock
from caesura_vm_agent.hooks import run_hook
from caesura_vm_agent.publisher import AgentPublisher
from caesura_vm_agent.settings import VmAgentSettings

_log = get_logger("caesura.agent")

_RETRY_SYNC_S = 2.0  # s: after a sync that nobody answered, for example because the host updater restarts
_FIRST_CONNECT_S = 60.0  # s: a first sync without a broker would only report that nobody answers
_FLUSH_S = 1.0  # s: for the last results at shutdown
_RESULTS_KEPT = 64  # sync results kept to answer a repeated `resumed`


def filters(settings: VmAgentSettings) -> tuple[str, ...]:
    """What an agent subscribes to: its set's document, its own resumes, the answers of its clock-syncs, whose VM it is."""
    host = {"host": settings.host} if settings.host else {}
    return (
        channel_of(SetDocument).filter(set=settings.set_name),
        channel_of(VmResumed).filter(vm=settings.vm, **host),
        channel_of(ClockSyncAnswered).filter(vm=settings.vm, **host),
        channel_of(VmOwner).filter(vm=settings.vm),
    )


class VmAgent:
    """One agent. ``boot_id`` lives in this process's memory only: the same one after a pause shows that the guest did not reboot."""

    def __init__(self, settings: VmAgentSettings, bus: Bus, clock: GuestClock, boot_id: str) -> None:
        self._settings = settings
        self._bus = bus
        self._clock = clock
        self.boot_id = boot_id
        self._announce_now = asyncio.Event()
        self._post = MessageClient(bus, source_of(settings.fleet, "vm", settings.vm))
        self._post.subscribe(SetDocument, self._on_document)
        self._post.subscribe(VmResumed, self._on_resumed)
        self._post.subscribe(ClockSyncAnswered, self._on_answer)
        self._post.subscribe(VmOwner, self._on_owner)
        self._post.on_tombstone(VmOwner, self._on_owner_removed)
        self.binding = HostBinding(settings.host)
        self._sampled = Sampler()
        self.canary = CanaryKeeper(settings.canary_bytes)
        self._voice = AgentPublisher(
            self._post,
            vm=settings.vm,
            boot_id=boot_id,
            clock="simulated" if clock.simulated else "system",
            canary=self.canary,
        )
        self.canary.on_filled = self._voice.presence.changed  # only then can a plan count on it
        self._resync = Resync(
            self._post,
            enabled=settings.broker_retained == "ignored",
            request=lambda: AgentResyncRequested(vm=settings.vm),
            publish=self._publish_again,
            vm=settings.vm,
        )
        self.run_resync = self._resync.run
        self.run_presence = self._voice.presence.run
        self.run_publisher = self._voice.publisher.run
        self._sync = ClockSync(settings.vm, boot_id, clock, settings.sync_policy, self._ask)
        self._state = readiness.ReadinessState(vm=settings.vm)
        self._hooks: asyncio.Queue[readiness.Prepare | readiness.Recover] = asyncio.Queue()
        self._resumes: asyncio.Queue[tuple[readiness.Recover, VmResumed]] = asyncio.Queue()
        self._results: OrderedDict[str, AgentClockSynced] = OrderedDict()
        self._repeat: asyncio.Queue[AgentClockSynced] = asyncio.Queue()
        self._received_ns = 0
        self.hooks_run: Counter[tuple[str, str]] = Counter()
        """(hook, outcome) to how often."""
        self.syncs: Counter[tuple[str, bool]] = Counter()
        """(trigger, synced) to how often."""
        self.last_sync: AgentClockSynced | None = None
        self.steps_refused = 0

    # -- tasks, each eternal ------------------------------------------------------------------------------

    @property
    def decode_errors(self) -> Counter[str]:
        """Messages that broke the contract, by kind."""
        return self._post.decode_errors

    async def run_bus(self) -> None:
        """Keep the connection; deliver."""
        await self._bus.run(self._deliver, self.publish_state)

    async def run_hooks(self) -> None:
        """Run queued hooks, one after the other."""
        while True:
            job = await self._hooks.get()
            if isinstance(job, readiness.Prepare):
                await self._prepare(job)
            else:
                await self._recover(job)

    async def run_clock(self) -> None:
        """Sync after every resume, at start, and from time to time."""
        trigger: Trigger = "start"
        await self._bus.wait_connected(_FIRST_CONNECT_S)
        wait_s = 0.0
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    resume, fact = await self._resumes.get()
            except TimeoutError:
                result = await self._sync_clock(trigger)
                trigger = "periodic" if result.exchanges else trigger
            else:
                paused_at_s = fact.at.timestamp() - fact.pause_s
                result = await self._sync_clock("resume", resume.operation, paused_at_s=paused_at_s)
                self._results[resume.operation] = result
                await self._compare_canary(result)
                while len(self._results) > _RESULTS_KEPT:
                    self._results.popitem(last=False)
                self._hooks.put_nowait(resume)
            # Nobody answered: try again soon, without waiting for the next period.
            wait_s = self._settings.sync_interval_s
            if not result.exchanges:
                wait_s = min(wait_s, _RETRY_SYNC_S)

    async def run_announcements(self) -> None:
        """Repeat answers: on request at once, and every few seconds while an event is scheduled."""
        while True:
            fresh = True
            try:
                async with asyncio.timeout(self._settings.announce_interval_s):
                    await self._announce_now.wait()
            except TimeoutError:
                fresh = False
            self._announce_now.clear()
            for announce in readiness.announcements(self._state, scheduled_only=not fresh):
                self._voice.ready(announce.ready)
            while not self._repeat.empty():
                self._voice.synced(self._repeat.get_nowait())

    async def run_canary(self) -> None:
        """Hold and rewrite the canary."""
        await self.canary.run()

    async def drain(self) -> None:
        """Announce offline and leave the bus."""
        if self._bus.stats.connected and not await self._voice.publisher.drained(_FLUSH_S):
            _log.warning("outbox.left", messages=len(self._voice.publisher))
        await self._voice.presence.goodbye(timeout_s=1.0)
        await self._bus.close()

    # -- bus ----------------------------------------------------------------------------------------------

    async def _deliver(self, delivery: Delivery) -> None:
        # t4 of a clock-sync exchange, taken before anything else costs time.
        self._received_ns = self._clock.now_ns()
        await self._post.deliver(delivery)

    async def publish_state(self) -> None:
        """On every (re)connect: the retained presence, and the answers that may have been lost."""
        self._resync.connected()
        await self._publish_again()

    async def _publish_again(self) -> None:
        await self._voice.presence.announce()
        self._announce_now.set()

    async def _on_owner(self, owner: VmOwner, _: Received) -> None:
        self.binding.record(owner.host)

    async def _on_owner_removed(self, _: Mapping[str, str]) -> None:
        self.binding.record(None)

    def _foreign(self, message: ClockSyncAnswered | VmResumed) -> bool:
        """Whether it comes from a host that this VM does not belong to: then it is ignored."""
        if self.binding.accepts(message.host):
            return False
        left_out = self._sampled.due(message.TYPE)
        if left_out is not None:
            _log.warning(
                "agent.foreign_host",
                host=message.host,
                belongs_to=self.binding.host,
                kind=message.TYPE,
                left_out=left_out,
            )
        return True

    async def _on_answer(self, answer: ClockSyncAnswered, _: Received) -> None:
        if self._foreign(answer):
            return
        self._sync.answered(answer, self._received_ns)

    async def _on_document(self, document: SetDocument, _: Received) -> None:
        if document.incarnation < self._state.incarnation:
            _log.warning(
                "agent.document_ignored", incarnation=document.incarnation, have=self._state.incarnation
            )
        self._apply(readiness.on_document(self._state, document))

    async def _on_resumed(self, resumed: VmResumed, _: Received) -> None:
        if self._foreign(resumed):
            return
        done = self._results.get(resumed.operation)
        if done is not None:
            self._repeat.put_nowait(done)
            self._announce_now.set()
            return
        state, effects = readiness.on_resumed(
            self._state, resumed.operation, resumed.event_id, resumed.pause_s
        )
        fresh = resumed.operation not in self._state.operations
        self._state = state
        if fresh:
            _log.info("agent.resumed", operation=resumed.operation, pause_s=resumed.pause_s)
            recover = next((each for each in effects if isinstance(each, readiness.Recover)), None)
            # Without a recovery to do, the clock is still to be corrected.
            recover = recover or readiness.Recover("", resumed.operation, resumed.pause_s)
            self._resumes.put_nowait((recover, resumed))

    def _apply(self, decided: tuple[readiness.ReadinessState, list[readiness.Effect]]) -> None:
        self._state, effects = decided
        for effect in effects:
            if isinstance(effect, readiness.Announce):
                self._announce_now.set()
            else:
                self._hooks.put_nowait(effect)

    # -- hooks --------------------------------------------------------------------------------------------

    async def _prepare(self, job: readiness.Prepare) -> None:
        event = job.event
        finished: HookFinished | None = None
        if self._settings.prepare_hook:
            finished = await run_hook(
                "prepare",
                self._settings.prepare_hook,
                vm=self._settings.vm,
                event_id=event.event_id,
                environ=self._hook_environ()
                | {
                    "CAESURA_EVENT_ID": event.event_id,
                    "CAESURA_EVENT_TYPE": event.event_type,
                    "CAESURA_NOT_BEFORE": event.not_before.isoformat(),
                },
                timeout_s=self._settings.prepare_timeout_s,
            )
            await self._hook_done(finished)
        answer = readiness.answer_of(self._settings.vm, event.event_id, finished)
        _log.info("agent.ready", event_id=event.event_id, ready=answer.ready, reason=answer.reason)
        self._apply(readiness.on_prepared(self._state, event.event_id, answer))

    async def _recover(self, job: readiness.Recover) -> None:
        if not self._settings.recover_hook:
            return
        finished = await run_hook(
            "recover",
            self._settings.recover_hook,
            vm=self._settings.vm,
            event_id=job.event_id,
            environ=self._hook_environ()
            | {
                "CAESURA_EVENT_ID": job.event_id,
                "CAESURA_OPERATION": job.operation,
                "CAESURA_PAUSE_S": f"{job.pause_s:.6f}",
            },
            timeout_s=self._settings.recover_timeout_s,
        )
        await self._hook_done(finished)

    def _hook_environ(self) -> dict[str, str]:
        return {
            "CAESURA_VM": self._settings.vm,
            "CAESURA_SET": self._settings.set_name,
            "CAESURA_UPDATE_DOMAIN": str(self._settings.update_domain),
        }

    async def _hook_done(self, finished: HookFinished) -> None:
        self.hooks_run[finished.hook, finished.outcome] += 1
        log = _log.info if finished.outcome == "succeeded" else _log.warning
        log(
            "hook.finished",
            hook=finished.hook,
            event_id=finished.event_id,
            outcome=finished.outcome,
            exit_code=finished.exit_code,
            seconds=round(finished.seconds, 3),
        )
        self._voice.hook_finished(finished)

    # -- clock --------------------------------------------------------------------------------------------

    async def _ask(self, request: ClockSyncRequested) -> None:
        await self._voice.ask(request, self._settings.sync_answer_timeout_s)

    async def _compare_canary(self, synced: AgentClockSynced) -> None:
        """After the clock was corrected and that was published: no verdict on a clock waits for pages to be compared."""
        found = await self.canary.report()
        if found is not None:
            result = msgspec.structs.replace(synced, canary=found)
            self._results[synced.operation] = result
            self._voice.synced(result)

    async def _sync_clock(
        self, trigger: Trigger, operation: str = "", *, paused_at_s: float | None = None
    ) -> AgentClockSynced:
        # Without a record any sender is accepted, so anybody could announce a resume to have any step made.
        known = bool(self.binding.host)
        result = await self._sync.run(trigger, operation, paused_at_s=paused_at_s, host_known=known)
        self.last_sync = result
        self.syncs[trigger, result.synced] += 1
        self.steps_refused += result.refused_step_s is not None
        log = _log.info if result.synced else _log.warning
        log(
            "clock.synced" if result.synced else "clock.unsynced",
            trigger=trigger,
            operation=operation,
            error_before_s=result.error_before_s,
            error_after_s=result.error_after_s,
            reason=result.reason,
        )
        self._voice.synced(result)
        return result
