"""Rollouts on the live page: the segments of their waves in the lanes of the domains that they touch. Pure."""

from __future__ import annotations

from datetime import datetime

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.live.activity import Level, LogEntry
from caesura_metrics_exporter.live.board import KEPT_S, Board
from caesura_metrics_exporter.live.pause_timelines import PauseLanes
from caesura_metrics_exporter.live.timelines import OF_WAVE, DomainKey
from caesura_metrics_exporter.rollout_index import OVER
from caesura_metrics_exporter.state_fold import StateFold

_FINAL = frozenset({"completed", "failed", "cancelled"})
_LEVELS: dict[str, Level] = {"completed": "good", "halted": "bad", "aborted": "warning"}


class RolloutLanes:
    """See the module. The cost of a rollout's state depends on its size and on the lanes of the waves that changed."""

    def __init__(self, board: Board, folded: StateFold, pauses: PauseLanes) -> None:
        self._board = board
        self._rollouts = folded.rollouts
        self._pauses = pauses
        self._drawn: dict[str, set[str]] = {}
        """Maps an active rollout to the lanes that it was drawn in, or waits for."""
        self._holder: dict[str, str] = {}
        """Maps a set to the rollout by which its paused VMs were placed."""

    def take(self, rollout: WholeRollout, known: WholeRollout | None, sent: float) -> None:
        """The state of a rollout, sent at ``sent``, unix seconds; ``known`` is the previous one, None for a new rollout."""
        board = self._board
        board.rollouts_at = board.touch()
        over = rollout.status in OVER
        for name in rollout.sets:
            holder = self._rollouts.holder(name)
            if holder is not None and self._holder.get(name) != holder.rollout:
                self._holder[name] = holder.rollout
                self._pauses.place_again(name)
        if not (over and known is None):  # one that ended before the exporter started is not drawn
            drawn = {wave.wave: wave.status for wave in known.waves} if known is not None else {}
            for wave in rollout.waves:
                if drawn.get(wave.wave) != wave.status:
                    at = _when(wave, sent)
                    self._wave(rollout, wave, at if known is not None else max(at, board.now - KEPT_S))
        if over:
            self._release(rollout, board.at(sent))
        before = known.status if known is not None else "running"
        if rollout.status != before:
            detail = ": ".join(filter(None, (rollout.update or "freeze on demand", rollout.reason)))
            level = _LEVELS.get(rollout.status, "quiet")
            board.say(LogEntry(board.at(sent), f"rollout {rollout.status}", level, detail=detail))

    def changed(self, message: m.WaveChanged) -> None:
        """A wave changed its status: it is drawn before the rollout's state arrives."""
        rollout = self._rollouts.known.get(message.rollout)
        # NotBefore comes with the state, so wait for that.
        if rollout is None or rollout.status in OVER or message.status == "scheduled":
            return
        for name, domain in message.domains.items():
            key = rollout.policy.domain_key
            self._wave_in(name, key, domain, rollout.rollout, message, message.at.timestamp())

    def removed(self, rollout: WholeRollout) -> None:
        """Its retained state was removed."""
        if rollout.status not in OVER:
            self._release(rollout, self._board.now)
        self._board.rollouts_at = self._board.touch()

    def _release(self, rollout: WholeRollout, at: float) -> None:
        board = self._board
        for name in sorted(self._drawn.pop(rollout.rollout, ())):
            lane = board.lanes.named(name)
            if lane is None:
                continue
            if lane.rollout == rollout.rollout:
                if lane.state != "frozen":
                    lane.close(at)
                lane.rollout, lane.wave, lane.wave_status = "", -1, ""
                board.lanes.changed(lane)
            if lane.waits is not None and lane.waits[0] == rollout.rollout:
                lane.waits = None
                board.lanes.changed(lane)
        for set_name in rollout.sets:
            if self._holder.get(set_name) == rollout.rollout:
                del self._holder[set_name]

    def _wave(self, rollout: WholeRollout, wave: m.WaveState, at: float) -> None:
        key = rollout.policy.domain_key
        not_before = wave.not_before.timestamp() if wave.not_before is not None else None
        for name, domain in wave.domains.items():
            self._wave_in(name, key, domain, rollout.rollout, wave, at, not_before)

    def _wave_in(
        self,
        name: str,
        key: DomainKey,
        domain: int,
        rollout: str,
        wave: m.WaveState | m.WaveChanged,
        at: float,
        not_before: float | None = None,
    ) -> None:
        board = self._board
        lane = board.lane(name, key, domain)
        if lane is None:
            return
        self._drawn.setdefault(rollout, set()).add(lane.name)
        state = OF_WAVE.get(wave.status)
        if state is None:  # it has not arrived yet
            lane.waits = (rollout, wave.wave)
            board.lanes.changed(lane)
            return
        if lane.waits == (rollout, wave.wave):
            lane.waits = None
            board.lanes.changed(lane)
        same_wave = (lane.rollout, lane.wave) == (rollout, wave.wave)
        if same_wave and lane.wave_status == wave.status:
            return
        if lane.rollout == rollout and lane.wave > wave.wave:
            return  # an earlier wave of this rollout had VMs of the domain, too: the later one is shown
        lane.rollout, lane.wave, lane.wave_status = rollout, wave.wave, wave.status
        long_ago = wave.status in _FINAL and at <= board.now - KEPT_S
        if not lane.standing and not long_ago:
            lane.enter(state, board.at(at), not_before=not_before, note=wave.reason)
        board.lanes.changed(lane)


def _when(wave: m.WaveState, sent: float) -> float:
    """When a wave reached its status, as far as the rollout's state shows."""
    at: datetime | None = wave.ended_at if wave.status in _FINAL else None
    if wave.status == "started":
        at = wave.started_at
    return at.timestamp() if at is not None else sent
