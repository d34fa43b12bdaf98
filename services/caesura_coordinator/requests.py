"""Operators' requests: each is decided once and answered; its answer is stored with what it changed, and sent again when it is repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import msgspec

from caesura.bus.port import Delivery
from caesura.contract import messages as m
from caesura.contract.codec import MAX_PAYLOAD_BYTES, ContractError, Received, request_in
from caesura.contract.envelope import fleet_of
from caesura.contract.names import is_name
from caesura.contract.reasons import ReasonCode
from caesura.contract.topics import PREFIX
from caesura.lifecycle.errors import IllegalStatusChange
from caesura.runtime.errors import StoreError
from caesura.runtime.identity import new_id
from caesura.runtime.logs import get_logger
from caesura.runtime.threads import in_thread
from caesura_coordinator.dispatcher import RolloutDispatcher
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Input, Resume, Tick
from caesura_coordinator.leadership import Leadership
from caesura_coordinator.not_before import first_not_before
from caesura_coordinator.outbox_relay import OutboxRelay
from caesura_coordinator.owners import Owners
from caesura_coordinator.proposal import Proposal, propose
from caesura_coordinator.queued_waves import MOST_QUEUED, waits_behind
from caesura_coordinator.records import Rollout
from caesura_coordinator.repository import RolloutRepository
from caesura_coordinator.request_refusals import RequestRefused, request_expired
from caesura_coordinator.responses import REASON_CHARACTERS

_REPEAT_PARTS_S = 5.0
"""s: between two sendings of a stored answer with a large plan."""
_LARGE_PLAN_VMS = 300
_PENDING = 1000
_log = get_logger("caesura.coordinator")

Request = m.RolloutRequested | m.FreezeRequested | m.AbortRequested | m.ResumeRequested


class _Pending(msgspec.Struct, frozen=True):
    """A request that arrived before the epoch was claimed."""

    request: Request
    asked_at: datetime
    """By the clock of the client."""
    arrived_at: datetime
    """By our clock."""


class RequestHandler:
    """Answers requests, one at a time. What arrives before an epoch is claimed waits for the claim.

    The bus waits for the answer, so that a request is acknowledged when what it started is stored, and sent again if this process ends before.

    Args:
        repository: where answers are stored, with the rollouts that they start or change.
        owners: knows the VMs that several hosts name, which a plan leaves as they are.
        relay: publishes the answers.
        dispatcher: evaluates the rollouts that a request has changed.
        leadership: only a leader answers.
        fleet: whose operators may ask.
        fleet_now: the view of the fleet that decisions read.
        now: the time of decisions.
    """

    def __init__(
        self,
        repository: RolloutRepository,
        owners: Owners,
        relay: OutboxRelay,
        dispatcher: RolloutDispatcher,
        leadership: Leadership,
        *,
        fleet: str = "default",
        fleet_now: Callable[[], FleetLookup],
        now: Callable[[], datetime],
    ) -> None:
        self._repository = repository
        self._owners = owners
        self._relay = relay
        self._dispatcher = dispatcher
        self._leadership = leadership
        self._fleet = fleet
        self._fleet_now = fleet_now
        self._now = now
        self.pending: dict[tuple[str, str], _Pending] = {}
        """Maps a client and request to the last repetition that arrived before the epoch was claimed; the newest ones."""
        self._repeated: dict[tuple[str, str], float] = {}
        """Maps a client and request to when an answer in parts was last sent."""
        self.plans = 0
        """Made since the start."""
        self._turn = asyncio.Lock()
        """Of the request that is being decided. A plan is made in a thread; the requests behind it wait, in the order of their arrival, so that an
        abort finds what was started before it, and a repetition the answer."""

    @property
    def deciding(self) -> bool:
        """Whether a request is being decided."""
        return self._turn.locked()

    async def on_request(self, request: Request, received: Received) -> None:
        """A request arrived."""
        client = received.parameters["client"]
        other = self._another_fleet(request, received)
        if self._leadership.claimed:
            refusal = other or _late(request, received.header.time, self._now())
            async with self._turn:
                await self._answer(client, request, refusal)
        elif other is None:  # else the client repeats its request until one leads, which refuses it
            self._wait_for_claim(client, request, asked_at=received.header.time)

    def _another_fleet(self, request: Request, received: Received) -> RequestRefused | None:
        """Why a request of another fleet's operator is not carried out. An abort is: it only stops operations."""
        other = fleet_of(received.header.source)
        if other in {"", self._fleet} or isinstance(request, m.AbortRequested):
            return None
        return RequestRefused(
            "request_of_another_fleet",
            f"this is fleet {self._fleet!r}, and the request is of fleet {other!r}: is the broker's address right, or CAESURA_CTL_FLEET?",
        )

    def _wait_for_claim(self, client: str, request: Request, *, asked_at: datetime) -> None:
        self.pending.pop((client, request.request), None)
        self._make_room()
        self.pending[client, request.request] = _Pending(
            request=request, asked_at=asked_at, arrived_at=self._now()
        )

    def _make_room(self) -> None:
        """Drop the oldest request, an abort only if there are none but aborts."""
        if len(self.pending) >= _PENDING:
            others = (
                key for key, each in self.pending.items() if not isinstance(each.request, m.AbortRequested)
            )
            oldest = next(others, next(iter(self.pending)))
            _log.error("request.dropped", client=oldest[0], request=oldest[1], why="no coordinator leads")
            del self.pending[oldest]

    async def on_refused(self, delivery: Delivery, error: ContractError) -> None:
        """An operator's request that violates the contract is answered too, if its topic names the client."""
        parts = delivery.topic.removeprefix(PREFIX + "/").split("/")
        if len(parts) == 3 and parts[0] == "ctl" and is_name(parts[1]):
            answer = m.RequestAnswered(
                request=request_in(delivery.payload) or "unreadable",
                accepted=False,
                reason=f"the coordinator cannot read this request; is it of a newer version? {error}"[:1000],
                codes=("message_invalid",),
            )
            try:
                self._repository.store_response(parts[1], answer)
            except StoreError as failed:
                _log.error("request.failed", client=parts[1], why=str(failed))
            self._relay.notify()

    async def hold(self) -> None:
        """Let later requests wait until ``answer_pending`` has answered. Call right after the claim: it is at once then."""
        await self._turn.acquire()

    async def answer_pending(self) -> None:
        """Answer the requests that arrived before the epoch was claimed, and that no coordinator which led in the meantime has answered.

        Call after ``hold``, which it ends.
        """
        try:
            pending, self.pending = self.pending, {}
            await self._answer_all(pending)
        finally:
            self._turn.release()

    async def _answer_all(self, pending: Mapping[tuple[str, str], _Pending]) -> None:
        for (client, name), each in pending.items():
            late = _late(each.request, min(each.asked_at, each.arrived_at), self._now()) or self._ambiguous(
                each
            )
            try:
                answered = self._repository.response(client, name) is not None
            except StoreError as error:
                _log.error("request.failed", request=name, why=str(error))
                continue
            # A client that repeats its request gets its answer again; one that asked long ago has it.
            if not (answered and request_expired(each.arrived_at, self._now())):
                await self._answer(client, each.request, late)

    def _ambiguous(self, pending: _Pending) -> RequestRefused | None:
        """Why an abort that names no rollout must not be carried out: the only active rollout is younger than it; None: it may."""
        request = pending.request
        if not isinstance(request, m.AbortRequested) or request.rollout:
            return None
        younger = [each.id for each in self._repository.active if each.created_at > pending.arrived_at]
        if not younger:
            return None
        return RequestRefused(
            "request_late",
            f"rollout {younger[0]} was started after this was asked, and the abort names none: ask again",
        )

    async def _answer(self, client: str, request: Request, refusal: RequestRefused | None) -> None:
        """Answer a request once; a repeated one gets the stored answer again. Call with the turn. ``refusal``: why a new one is not decided."""
        try:
            known = self._repository.response(client, request.request)
            if known is not None:
                self._repeat(client, known)
            elif self._leadership.is_leader and refusal is not None:
                _log.warning(
                    "request.outlived" if refusal.code == "request_late" else "request.of_another_fleet",
                    client=client,
                    request=request.request,
                    why=str(refusal),
                )
                self._refuse(client, request, refusal.code, str(refusal))
            elif self._leadership.is_leader:
                await self._decide(client, request)
        except StoreError as error:
            _log.error("request.failed", request=request.request, why=str(error))
        self._relay.notify()
        self._dispatcher.wake()

    def _repeat(self, client: str, answer: m.RequestAnswered) -> None:
        """Send a stored answer again. An answer in parts is not sent with every repetition: it may have megabytes, and delays everything behind it."""
        now_s = asyncio.get_running_loop().time()
        self._repeated = {key: at for key, at in self._repeated.items() if now_s - at < _REPEAT_PARTS_S}
        if (client, answer.request) in self._repeated:
            return
        if answer.plan is not None and sum(len(wave.vms) for wave in answer.plan.waves) > _LARGE_PLAN_VMS:
            self._repeated[client, answer.request] = now_s
        self._repository.repeat_response(client, answer)

    async def _decide(self, client: str, request: Request) -> None:
        try:
            match request:
                case m.RolloutRequested() | m.FreezeRequested():
                    await self._plan_or_start(client, request)
                case m.AbortRequested():
                    self._control(client, request, Abort(reason=request.reason))
                case m.ResumeRequested():
                    self._control(client, request, Resume())
        except StoreError:
            raise
        except RequestRefused as error:
            if self._leadership.is_leader:  # a plan takes its time
                self._refuse(client, request, error.code, str(error))
        except IllegalStatusChange as error:
            self._refuse(client, request, "rollout_state", str(error))

    def _refuse(self, client: str, request: Request, code: ReasonCode, why: str) -> None:
        answer = m.RequestAnswered(
            request=request.request, accepted=False, reason=why[:REASON_CHARACTERS], codes=(code,)
        )
        self._repository.store_response(client, answer)

    async def _plan_or_start(self, client: str, request: m.RolloutRequested | m.FreezeRequested) -> None:
        now = self._now()
        # The fleet may change while the plan is made, as it may between the plan and its first wave: before each pause the gates
        # compare every VM and host with what is reported then. What is ours (who leads, which rollouts hold sets) is read afterwards.
        # The bus hands nothing on in this time, so time must not pass for rollouts either: see Coordinator.
        self.plans += 1
        fleet = self._fleet_now().snapshot(self._owners.contested())
        active = self._repository.active if request.queue else []
        name = f"{now:%Y%m%d-%H%M%S}-{new_id()[:4]}"
        proposal = await in_thread(
            "plan",
            lambda: propose(fleet, request, client=client, rollout_id=name, now=now, ahead=active),
        )
        if not self._leadership.is_leader:
            _log.warning(
                "request.not_decided", client=client, request=request.request, why="the lead was lost"
            )
            # As one that arrives while nobody leads: it may be this coordinator that leads next, and the broker will not send it again.
            self._wait_for_claim(client, request, asked_at=now)
            return
        held = self._repository.holder(proposal.sets)
        if held and not request.plan_only and not request.queue:
            answer = msgspec.structs.replace(
                proposal.answer,
                accepted=False,
                reason=f"set {held[0]} is held by rollout {held[1]}: wait for its end, resume or abort it, or queue behind it (--queue)",
                codes=("set_held",),
                rollout="",
            )
            self._repository.store_response(client, answer)
        elif proposal.rollout is None:
            self._repository.store_response(client, proposal.answer)
        else:
            self._start(client, request, proposal, proposal.rollout)

    def _start(
        self,
        client: str,
        request: m.RolloutRequested | m.FreezeRequested,
        proposal: Proposal,
        proposed: Rollout,
    ) -> None:
        now = self._now()
        ahead = self._repository.holding_or_waiting(proposal.sets)
        rollout = msgspec.structs.replace(
            proposed, created_at=now, queued_behind=ahead[-1].id if ahead else ""
        )
        answer = proposal.answer
        if ahead:
            _check_queue(proposal, rollout, ahead)
            answer = msgspec.structs.replace(
                answer,
                reason=_queue_note(ahead),
                codes=("queued",),
                queued_behind=ahead[-1].id,
                not_before=first_not_before(request.policy, ahead, now),
            )
        if proposal.too_large:
            raise RequestRefused("too_large", proposal.too_large)
        self._repository.add(rollout, client, answer)
        _log.info(
            "rollout.started",
            rollout=rollout.id,
            update=rollout.update,
            waves=len(rollout.waves),
            queued_behind=rollout.queued_behind,
            client=client,
        )
        try:
            if ahead:
                # At the same moment, so that NotBefore is what the answer says.
                stored = self._repository.rollouts[rollout.id]
                self._repository.step(stored, Tick(), self._fleet_now(), self._leadership.authority, now)
        except StoreError as error:
            _log.error("rollout.not_announced", rollout=rollout.id, why=str(error))  # tried again in a moment
        try:
            self._repository.prune()
        except StoreError as error:
            _log.error("rollout.not_forgotten", why=str(error))

    def _control(self, client: str, request: m.AbortRequested | m.ResumeRequested, received: Input) -> None:
        """Abort or resume a rollout: the one that the request names, or the only active one."""
        active = self._repository.active
        known = ", ".join(each.id for each in active) or "none"
        if request.rollout:
            rollout = self._repository.rollouts.get(request.rollout)
            if rollout is None:
                raise RequestRefused("rollout_unknown", f"no rollout {request.rollout!r}; not ended: {known}")
        elif len(active) == 1:
            rollout = active[0]
        else:
            raise RequestRefused(
                "rollout_unknown",
                f"several rollouts have not ended, name one: {known}"
                if active
                else "no rollout is under way: all have ended",
            )
        answer = m.RequestAnswered(request=request.request, accepted=True, rollout=rollout.id)
        self._repository.step(
            rollout,
            received,
            self._fleet_now(),
            self._leadership.authority,
            self._now(),
            answer=(client, answer),
        )
        self._dispatcher.request_commands()


def _late(request: Request, asked_at: datetime, now: datetime) -> RequestRefused | None:
    """Why a request is too late; None: it is not. An abort never is: it only stops operations."""
    why = "" if isinstance(request, m.AbortRequested) else request_expired(asked_at, now)
    return RequestRefused("request_late", why) if why else None


def _check_queue(proposal: Proposal, rollout: Rollout, ahead: Sequence[Rollout]) -> None:
    """Raises RequestRefused: too many wait already, or the documents could not show the events of all of them."""
    if len(ahead) > MOST_QUEUED:
        raise RequestRefused(
            "queue_full",
            f"{len(ahead) - 1} rollouts already wait behind rollout {ahead[0].id}, and no more may: wait for its end, or abort some",
        )
    together = dict(proposal.largest_events[rollout.id])
    for other in ahead:
        for name, size in proposal.largest_events[other.id].items():
            if name in together:
                together[name] += size
    for name, size in together.items():
        if size > MAX_PAYLOAD_BYTES:
            raise RequestRefused(
                "too_large",
                f"the document of set {name} could not show the events of all rollouts in the queue ({size} bytes of "
                f"{MAX_PAYLOAD_BYTES}): wait for the end of rollout {ahead[0].id}, or allow fewer hosts in a wave (--max-hosts)",
            )


def _queue_note(ahead: Sequence[Rollout]) -> str:
    """What the operator should know about the rollouts that the new one waits for."""
    halted = [each.id for each in ahead if each.status == "halted"]
    stuck = (
        f" ({', '.join(halted)} is halted: resume or abort it, else this one waits indefinitely)"
        if halted
        else ""
    )
    return waits_behind(ahead[-1].id) + stuck
