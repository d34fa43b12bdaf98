"""The content of the live page: lanes, rollouts, pauses and a log. A view of ``StateFold``, and of the facts that it does not keep. Pure.

Pauses are drawn by ``pause_timelines``, rollouts by ``rollout_timelines``, both on ``board``. Everything carries the
revision of its last change, so that the changes since any revision can be sent without a queue for each reader. Times are unix seconds,
from the messages; a message whose time cannot be right by the exporter's clock (it lies in the future, or long ago) is drawn where it was
received. Bounded by time (``KEPT_S``) and by count. The cost of a message depends on its content.
"""

from __future__ import annotations

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import match_topic
from caesura.fleet.coordinators import announced_coordinators
from caesura.fleet.fold import Changes
from caesura_metrics_exporter.live.activity import LogEntry, log_entry
from caesura_metrics_exporter.live.alarms import ALARMS_SENT
from caesura_metrics_exporter.live.board import KEPT_S, Board
from caesura_metrics_exporter.live.page_json import Delta, FleetSummary, rollout_view
from caesura_metrics_exporter.live.pause_timelines import PauseLanes
from caesura_metrics_exporter.live.places import Places
from caesura_metrics_exporter.live.rollout_timelines import RolloutLanes
from caesura_metrics_exporter.rollout_index import OVER, ROLLOUTS_KEPT
from caesura_metrics_exporter.state_fold import FoldResult, StateFold

__all__ = ["KEPT_S", "PAUSED_SENT", "ROLLOUTS_KEPT", "LivePageState"]

PAUSED_SENT = 200  # a wave may pause more; the rest is a number
_GONE = "gone while it was paused"


class LivePageState:
    """See the module.

    Args:
        folded: a fold that the caller updates, passing each step; without it this view folds by itself.
    """

    def __init__(self, folded: StateFold | None = None) -> None:
        self._folded = folded if folded is not None else StateFold()
        self._state = self._folded.state
        self._rollouts = self._folded.rollouts
        places = Places(self._folded)
        self._board = Board(places.count)
        self._lanes = self._board.lanes
        self._pauses = PauseLanes(self._board, places, self._folded)
        self._waves = RolloutLanes(self._board, self._folded, self._pauses)
        self._hosts: set[str] = set()
        """The known ones."""
        self._offline_since: dict[str, float] = {}
        self._led = False
        """Whether a coordinator was on the bus, as last shown."""
        self._mono = 0.0
        """The exporter's monotonic clock at the last message or tick, s."""
        self._standby_before = ""
        self._broker = "not connected yet"
        self._broker_since = 0.0

    @property
    def revision(self) -> int:
        """Revision of the last change."""
        return self._board.revision

    @property
    def now(self) -> float:
        """The wall clock of the last message or tick, unix seconds."""
        return self._board.now

    # -- input --------------------------------------------------------------------------------------------

    def take(
        self, received: Received, now: float, mono: float, *, fresh: bool, step: FoldResult | None = None
    ) -> None:
        """Follow one message, received at ``now``.

        Args:
            received: the message.
            now: unix seconds, by the exporter's wall clock.
            mono: seconds of its monotonic clock, by which a jump of the wall clock is detected; here and below.
            fresh: false for a repetition: then only state is updated.
            step: the changes, if the caller has folded the message.
        """
        self.tick(now, mono)
        message = received.message
        step = step if step is not None else self._folded.take(message, mono)
        self._follow(message, step, received.header.time.timestamp())
        if fresh:
            self._fact(message)
            line = log_entry(message, now)
            if line is not None:
                self._board.say(line)

    def clear(self, topic: str, now: float, mono: float, step: FoldResult | None = None) -> None:
        """A retained message was removed: its subject no longer exists. ``step`` as in ``take``."""
        self.tick(now, mono)
        place = match_topic(topic)
        if place is None:
            return
        step = step if step is not None else self._folded.clear(topic, mono)
        channel, named = place
        if channel.message is m.HostInventory:
            self.forget_host(named["host"], step)
        elif channel.message is m.HostPresence:
            if self._state.reported(named["host"]) is None and named["host"] in self._hosts:
                self.forget_host(named["host"], step)
        elif channel.message is m.VmOwner:
            if self._board.alarms.agreed(named["vm"], now):
                self._board.touch_head()
            self._moved(step.changes)
        elif channel.message is m.CoordinatorPresence:
            self._coordinator()
        elif channel.message is m.RolloutState and step.rollout is not None:
            self._waves.removed(step.rollout)

    def connection(self, wrong: str, now: float, mono: float) -> None:
        """The problem of the exporter's own connection; empty if there is none."""
        self.tick(now, mono)
        if wrong != self._broker:
            if bool(wrong) != bool(self._broker) or not self._broker_since:
                self._broker_since = now
            self._broker = wrong
            self._board.touch_head()

    def tick(self, now: float, mono: float) -> None:
        """Advance the time. If the wall clock jumped, recorded times move with it, so that durations do not change."""
        self._mono = mono
        by = self._board.tick(now, mono)
        if by:
            self._broker_since += by
            self._offline_since = {host: at + by for host, at in self._offline_since.items()}

    def expire(self, now: float, mono: float) -> None:
        """Drop what is older than ``KEPT_S``; call it from time to time."""
        self.tick(now, mono)
        if (standby := self._standby()) != self._standby_before:  # one may have fallen silent
            self._standby_before = standby
            self._board.touch_head()
        self._pauses.expire()
        self._board.expire()

    def forget_host(self, host: str, step: FoldResult | None = None) -> None:
        """The host was removed permanently. ``step`` as in ``take``."""
        step = step if step is not None else self._folded.take_back(m.HostInventory, {"host": host}, 0.0)
        self._hosts.discard(host)
        self._offline_since.pop(host, None)
        self._moved(step.changes, why=f"no word from {host}")
        self._pauses.host_gone(host)
        self._board.touch_head()

    # -- output -------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Delta:
        """Everything."""
        return self._change(0, now, whole=True)

    def since(self, revision: int, now: float) -> Delta:
        """The changes after ``revision``; everything if they are unknown."""
        whole = not self._board.floor <= revision <= self._board.revision
        return self._change(0 if whole else revision, now, whole=whole)

    def _change(self, after: int, now: float, *, whole: bool) -> Delta:
        board = self._board
        return Delta(
            whole=whole,
            revision=board.revision,
            now=now,
            kept_s=KEPT_S,
            fleet=self._fleet() if board.head_at > after else None,
            rollouts=tuple(rollout_view(each, board.paused.count_of) for each in self._shown())
            if board.rollouts_at > after
            else None,
            paused=board.paused.view(PAUSED_SENT) if board.paused_at > after else None,
            lanes=tuple(board.lanes.view(lane) for lane in board.lanes.since(after)),
            log=tuple(board.log.since(after)),
        )

    def _fleet(self) -> FleetSummary:
        coordinator, board = self._state.coordinator, self._board
        return FleetSummary(
            broker=self._broker,
            broker_since=self._broker_since,
            coordinator="unknown" if coordinator is None else "online" if coordinator.online else "offline",
            standby=self._standby(),
            hosts=len(self._hosts),
            hosts_offline=tuple(sorted(self._offline_since)),
            offline_since=dict(self._offline_since),
            vms=len(self._state.vm_names()),
            sets=board.lanes.sets,
            domains=board.lanes.domains,
            paused=len(board.paused),
            full=board.lanes.full,
            alarms=board.alarms.current(),
            alarms_by_rule=board.alarms.counts(),
            alarms_more=max(0, len(board.alarms) - ALARMS_SENT),
        )

    def _standby(self) -> str:
        if not self._state.words.named(m.CoordinatorStatus):
            return ""
        others = announced_coordinators(self._state, self._mono).values()
        waiting = [each.waits_for for each in others if each.online and each.leads and each.waits_for]
        if waiting:
            return f"rollouts wait for {waiting[0]}"
        ready = sorted(each.coordinator for each in others if each.online and not each.leads)
        return f"{', '.join(ready)} standing by" if ready else "no other stands by"

    def _shown(self) -> list[WholeRollout]:
        newest = sorted(self._rollouts.known.values(), key=lambda each: each.created_at, reverse=True)
        open_ones = [each for each in newest if each.status not in OVER]
        open_ones.sort(key=lambda each: bool(each.queued_behind))  # the page tells of the first one in full
        return open_ones or newest[:1]

    # -- state ----------------------------------------------------------------------------------------------

    def _follow(self, message: Message, step: FoldResult, sent: float) -> None:
        match message:
            case WholeRollout():
                self._waves.take(message, step.rollout, sent)
            case m.HostInventory():
                self._inventory(message.host, step.changes)
            case m.VmOwner():
                if step.changes.word and self._board.alarms.contested(message, self._board.now):
                    self._board.touch_head()
                self._moved(step.changes)
            case m.HostPresence():
                self._presence(message)
            case m.CoordinatorPresence():
                self._coordinator()
            case m.CoordinatorStatus():
                if step.changes.word:
                    self._board.touch_head()
            case _:
                pass

    def _coordinator(self) -> None:
        coordinator = self._state.coordinator
        leads = coordinator is not None and coordinator.online
        if self._led and not leads:
            self._board.say(LogEntry(at=self._board.now, what="coordinator offline", level="warning"))
        self._led = leads
        self._board.touch_head()

    def _presence(self, message: m.HostPresence) -> None:
        host, board = message.host, self._board
        was_offline = host in self._offline_since
        if host in self._hosts and message.online != was_offline:
            return  # unchanged
        self._hosts.add(host)
        if message.online and was_offline:
            del self._offline_since[host]
            board.say(LogEntry(at=board.now, what="host updater online", host=host))
        elif not message.online:
            self._offline_since[host] = board.now
            board.say(LogEntry(at=board.now, what="host updater offline", level="warning", host=host))
        board.touch_head()

    def _inventory(self, host: str, changes: Changes) -> None:
        if host not in self._hosts:
            self._hosts.add(host)
            self._board.touch_head()
        self._moved(changes, said_by=host)
        inventory = self._state.inventory(host)
        for record in inventory.vms if inventory is not None else ():
            self._pauses.found(record, host, inventory.operation if inventory is not None else "")

    def _moved(self, changes: Changes, *, why: str = _GONE, said_by: str = "") -> None:
        """The state of VMs changed.

        Args:
            why: the log text for a VM that was removed while paused.
            said_by: the host whose inventory caused it: its VMs are updated separately.
        """
        moved = False
        for vm in sorted(changes.vms):
            before, after = changes.before.get(vm), self._state.vm(vm)
            if before == after:
                continue
            moved = True
            self._pauses.moved(vm, before, after, why)
            if after is None or after.host == said_by or (before is not None and before.host == after.host):
                continue
            inventory = self._state.reported(after.host)
            self._pauses.found(after.record, after.host, inventory.operation if inventory is not None else "")
        if moved:
            self._board.touch_head()

    # -- facts --------------------------------------------------------------------------------------------

    def _fact(self, message: Message) -> None:
        match message:
            case m.WaveChanged():
                self._waves.changed(message)
            case m.VmFrozen():
                self._pauses.frozen(message)
            case m.VmResumed():
                self._pauses.resumed(message)
            case m.VmClockSynced():
                self._pauses.clock(message)
            case _:
                pass
