"""One step of a rollout: its changing state, the effects so far, and the transitions that inputs and time share. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import msgspec

from caesura.contract.messages import WaveStatus
from caesura.contract.reasons import Reason, codes_of
from caesura_coordinator.authority import Authority
from caesura_coordinator.effects import Effect, EventEnded, RolloutMoved, WaveMoved
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.records import (
    Rollout,
    Wave,
)
from caesura_coordinator.text import join_reasons, truncate


class Decision:
    """One call of ``decide``: the rollout as it changes, and the effects so far.

    A wave gets several messages of each of its VMs, so no message looks at all of them. Each message is judged when it
    arrives; the whole wave is judged when everything has arrived, or its time is up. Only that judgement completes waves, one after
    the other.
    """

    def __init__(
        self,
        rollout: Rollout,
        fleet: FleetLookup,
        authority: Authority,
        now: datetime,
        ahead: Sequence[Rollout] = (),
    ) -> None:
        self.rollout = rollout
        self.fleet = fleet
        self.authority = authority
        self.now = now
        self.ahead = ahead
        """The older rollouts that have not ended and share a set with this one, oldest first: it waits for all of them."""
        self.effects: list[Effect] = []
        self.refused = False
        """Whether an agent has just reported that its guest is not ready."""
        self.time_passed = False
        """Whether this step is for the time that passed or a change of the fleet, not for a message about the rollout."""
        self.wrong = False
        """Whether this step has brought, or may have brought, a failure."""

    def after(self, seconds: float) -> datetime:
        """The time that many seconds from now."""
        return self.now + timedelta(seconds=seconds)

    def put(self, wave: Wave) -> Wave:
        """Replace the wave."""
        self.rollout = with_wave(self.rollout, wave)
        return wave

    def move(self, wave: Wave, status: WaveStatus, **changes: object) -> Wave:
        """Change its status; it no longer waits for a gate."""
        moved = self.put(
            msgspec.structs.replace(
                wave, status=status, waiting_since=None, waiting_for="", waiting_codes=(), **changes
            )
        )
        self.effects.append(WaveMoved(wave=moved))
        return moved

    def end_events(
        self,
        wave: Wave,
        status: str,
        reason: str = "",
        codes: tuple[str, ...] = (),
        *,
        only: Collection[str] | None = None,
    ) -> Wave:
        """Bring every open event of the wave to its final status; with ``only``, those with these ids."""
        events = []
        for event in wave.events:
            if event.status in {"scheduled", "started"} and (only is None or event.event_id in only):
                event = msgspec.structs.replace(event, status=status)  # noqa: PLW2901
                self.effects.append(EventEnded(event=event, reason=reason, codes=codes))
            events.append(event)
        return self.put(msgspec.structs.replace(wave, events=tuple(events)))

    def halt(self, wave: Wave, why: Sequence[Reason], before: str = "") -> None:
        """Fail the wave and halt the rollout. Scheduled events are cancelled, started ones failed."""
        self.halt_for(wave, before + join_reasons(why), codes_of(why))

    def halt_for(self, wave: Wave, reason: str, codes: tuple[str, ...]) -> None:
        """The same with the reasons in one sentence."""
        reason = truncate(reason)
        started = wave.started_at is not None
        wave = self.end_events(wave, "failed" if started else "cancelled", reason, codes)
        self.move(wave, "failed", reason=reason, codes=codes, ended_at=self.now)
        self.rollout = msgspec.structs.replace(self.rollout, status="halted", reason=reason, codes=codes)
        self.effects.append(RolloutMoved(rollout=self.rollout))

    def finish(self, status: str, reason: str = "", codes: tuple[str, ...] = ()) -> None:
        """End the rollout."""
        self.rollout = msgspec.structs.replace(
            self.rollout, status=status, queued_behind="", reason=reason, codes=codes, ended_at=self.now
        )
        self.effects.append(RolloutMoved(rollout=self.rollout))

    def blocked(self, wave: Wave, blockers: Sequence[Reason]) -> bool:
        """Wait for a gate; halt when it stays closed for the verify timeout."""
        if not blockers:
            if wave.waiting_since is not None:  # it opened: the next closure gets the whole timeout again
                self.put(msgspec.structs.replace(wave, waiting_since=None, waiting_for="", waiting_codes=()))
            return False
        why = join_reasons(blockers)
        since = wave.waiting_since or self.now
        if self.now - since >= timedelta(seconds=self.rollout.policy.verify_timeout_s):
            self.halt(wave, blockers, "cannot continue: ")
        elif (wave.waiting_since, wave.waiting_for) != (since, why):
            codes = codes_of(blockers)
            self.put(msgspec.structs.replace(wave, waiting_since=since, waiting_for=why, waiting_codes=codes))
        return True


def with_wave(rollout: Rollout, wave: Wave) -> Rollout:
    """The rollout with one of its waves replaced."""
    before, after = rollout.waves[: wave.index], rollout.waves[wave.index + 1 :]
    return msgspec.structs.replace(rollout, waves=(*before, wave, *after))
