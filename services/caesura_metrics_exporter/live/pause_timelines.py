"""Pauses on the live page: which VMs are paused, and the segments in their lanes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from caesura.contract import messages as m
from caesura.fleet.state import LocatedVm
from caesura_metrics_exporter.live.activity import Level, LogEntry
from caesura_metrics_exporter.live.board import KEPT_S, Board
from caesura_metrics_exporter.live.paused_vms import Paused
from caesura_metrics_exporter.live.places import Places
from caesura_metrics_exporter.live.timelines import OF_WAVE, Clock, PausePoint, Timeline
from caesura_metrics_exporter.state_fold import StateFold


class PauseLanes:
    """See the module. Facts are overlaid on inventories, since they arrive first."""

    def __init__(self, board: Board, places: Places, folded: StateFold) -> None:
        self._board = board
        self._places = places
        self._folded = folded

    # -- facts --------------------------------------------------------------------------------------------

    def frozen(self, message: m.VmFrozen) -> None:
        """A host paused a VM."""
        key, domain = self._places.of(message.vm, message.set, message.update_domain)
        known = self._board.paused.get(message.vm)
        if known is not None and (known.set, known.key, known.domain) != (message.set, key, domain):
            self._end(known, self._board.now)  # its end was missed, and it is in another lane now
        self._pause(
            Paused(
                vm=message.vm,
                set=message.set,
                update_domain=message.update_domain,
                key=key,
                domain=domain,
                host=message.host,
                received=self._board.now,
                operation=message.operation,
                method=message.method,
                since=self._board.at(message.at.timestamp()),
                budget=message.budget_s,
            )
        )

    def resumed(self, message: m.VmResumed) -> None:
        """A VM runs after a pause."""
        board = self._board
        at = board.at(message.at.timestamp())
        paused = board.paused.get(message.vm)
        place = (
            (paused.key, paused.domain)
            if paused is not None
            else self._places.of(message.vm, message.set, message.update_domain)
        )
        lane = board.lane(message.set, *place)
        if lane is not None:
            seconds, over = round(message.pause_s, 6), not message.within_budget
            guard = message.resumed_by == "guard"
            lane.mark(PausePoint(round(at, 3), message.vm, seconds, message.budget_s, over, guard))
            if paused is None and lane.state != "frozen":
                # Its start was missed: derive it from the pause's length.
                lane.enter("frozen", at - message.pause_s)
                _resume(lane, at)
                if not lane.rollout:
                    lane.close(at)
            board.lanes.changed(lane)
        if paused is not None:
            self._end(paused, at)
        if board.alarms.resumed(message, board.now):
            board.touch_head()

    def clock(self, message: m.VmClockSynced) -> None:
        """A verdict on a VM's clock."""
        board = self._board
        lane = board.lane(message.set, *self._places.of(message.vm, message.set, message.update_domain))
        if lane is not None:
            verdict = (message.synced, message.error_before_s, message.error_after_s, message.simulated)
            lane.clocks[message.vm] = Clock(message.vm, *verdict)
            board.lanes.changed(lane)
        if board.alarms.clock(message, board.now):
            board.touch_head()

    # -- inventories --------------------------------------------------------------------------------------

    def moved(self, vm: str, before: LocatedVm | None, after: LocatedVm | None, why: str) -> None:
        """The state of a VM changed. ``why`` is the log text if it was removed while paused."""
        board = self._board
        self._places.moved(before, after)
        if before is not None and (after is None or _domains(before.record) != _domains(after.record)):
            for lane in self._lanes_of(before.record):
                lane.clocks.pop(vm, None)
                board.lanes.changed(lane)
        paused = board.paused.get(vm)
        if after is None:
            if board.alarms.gone(vm, board.now):
                board.touch_head()
            if paused is not None:
                self._lose(paused, why)
            return
        if before is not None and _domains(before.record) == _domains(after.record):
            return
        board.lane(after.record.set, "update_domain", after.record.update_domain)
        for lane in self._lanes_of(after.record):
            board.lanes.changed(lane)
        if paused is not None and paused.set == after.record.set:
            self._place_again(paused.set, [paused])

    def found(self, record: m.VmRecord, host: str, operation: str) -> None:
        """A host's report about its VM. ``operation``: the one that it reports as under way."""
        board = self._board
        board.lane(
            record.set, "update_domain", record.update_domain
        )  # there may have been no room for the lane
        paused = board.paused.get(record.vm)
        if record.state == "paused" and paused is None:
            place = self._places.of(record.vm, record.set, record.update_domain)
            self._pause(Paused(record.vm, record.set, record.update_domain, *place, host, board.now))
        elif paused is not None and record.state != "paused":
            under_way = paused.operation and operation == paused.operation
            if under_way:
                pass
            elif (
                record.state == "running"
            ):  # its fact was missed, or there is none because somebody else paused it
                self._end(paused, board.now)
            else:
                board.alarms.stopped(record.vm, record.set, host, record.state, board.now)
                self._end(paused, board.now, "failed")
                self._say_of(paused, f"{record.state} after its pause", "bad")
        changed = [board.alarms.attention(record, host, board.now)]
        if record.state == "running":
            changed.append(board.alarms.runs(record.vm, board.now))
        if any(changed):
            board.touch_head()

    def host_gone(self, host: str) -> None:
        """The host was removed permanently: nothing more will be received about its pauses."""
        for paused in self._board.paused.on(host):
            self._lose(paused, f"no word from {host}")

    def expire(self) -> None:
        """Drop old pauses of VMs that do not belong to a host."""
        board = self._board
        for paused in [each for each in board.paused if self._folded.state.vm(each.vm) is None]:
            if paused.received < board.now - KEPT_S:
                self._lose(paused, f"no word from {paused.host}")

    def place_again(self, set_name: str) -> None:
        """VMs of the set were placed before their rollout or their place was known."""
        self._place_again(set_name, self._board.paused.of(set_name))

    # -- internal -----------------------------------------------------------------------------------------

    def _place_again(self, set_name: str, those: Iterable[Paused]) -> None:
        board = self._board
        clashed = board.paused.clash(set_name)
        for paused in those:
            key, domain = self._places.of(paused.vm, paused.set, paused.update_domain)
            if (key, domain) == (paused.key, paused.domain):
                continue
            board.paused.remove(paused.vm)
            lane = self._counted(paused)
            if lane is not None and not lane.standing:
                lane.take_back()
            self._pause(replace(paused, key=key, domain=domain))
        if clashed and not board.paused.clash(set_name):
            board.alarms.end_two_domains(set_name, board.now, mistaken=True)

    def _pause(self, paused: Paused) -> None:
        board = self._board
        board.paused.add(paused)
        lane = board.lane(paused.set, paused.key, paused.domain)
        if lane is not None:
            unknown = paused.since is None
            lane.enter("frozen", board.now if paused.since is None else paused.since, since_unknown=unknown)
        self._counted(paused)
        clash = board.paused.clash(paused.set)
        if clash:
            board.alarms.two_domains(paused.set, clash, board.now)

    def _counted(self, paused: Paused) -> Timeline | None:
        """The paused VMs of this VM's lane changed."""
        board = self._board
        board.paused_at = board.head_at = board.touch()
        if len(self._folded.rollouts):
            board.rollouts_at = board.paused_at
        lane = board.lanes.get(paused.set, paused.key, paused.domain)
        if lane is not None:
            lane.standing = board.paused.count_in(paused.set, paused.key, paused.domain)
            board.lanes.changed(lane)
        return lane

    def _end(self, paused: Paused, at: float, how: Literal["resumed", "failed", "lost"] = "resumed") -> None:
        board = self._board
        board.paused.remove(paused.vm)
        lane = self._counted(paused)
        if not board.paused.clash(paused.set):
            board.alarms.end_two_domains(paused.set, board.now)
        if lane is None or lane.state != "frozen" or lane.standing:
            return
        if how == "resumed":
            _resume(lane, at)
        elif how == "failed":
            lane.enter("failed", at)
        if how == "lost" or not lane.rollout:
            lane.close(at)

    def _lose(self, paused: Paused, why: str) -> None:
        """Nothing more will be received about this pause."""
        self._end(paused, self._board.now, "lost")
        self._say_of(paused, why, "warning")

    def _say_of(self, paused: Paused, what: str, level: Level) -> None:
        of = paused
        self._board.say(LogEntry(self._board.now, what, level, of.set, of.update_domain, of.vm, of.host))

    def _lanes_of(self, record: m.VmRecord) -> list[Timeline]:
        by_update = self._board.lanes.get(record.set, "update_domain", record.update_domain)
        by_fault = self._board.lanes.get(record.set, "fault_domain", record.fault_domain)
        return [lane for lane in (by_update, by_fault) if lane is not None]


def _resume(lane: Timeline, at: float) -> None:
    """No VM of the lane is paused any more."""
    state = OF_WAVE.get(lane.wave_status, "resumed")
    lane.enter("resumed" if state in {"scheduled", "started"} else state, at)


def _domains(record: m.VmRecord) -> tuple[str, int, int]:
    return record.set, record.update_domain, record.fault_domain
