"""What the live page shows: a fold of the bus into lanes, rollouts, pauses and a log. Pure.

Everything carries the revision of its last change, so that what changed since any revision can be told without a
queue for each reader. Times are unix seconds, from the messages; a message whose time cannot be right by the exporter's
clock (it lies in the future, or long ago) is drawn where it was heard. Bounded by time (``KEPT_S``) and by count.
"""

from __future__ import annotations

from collections import deque
from datetime import datetime

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.topics import TopicError, channel_at
from caesura_metrics_exporter.alarms import Alarms
from caesura_metrics_exporter.happenings import Happening, happening
from caesura_metrics_exporter.lanebook import LaneBook
from caesura_metrics_exporter.lanes import OF_WAVE, Clock, DomainKey, Lane, Mark
from caesura_metrics_exporter.standing import Paused, Standing
from caesura_metrics_exporter.views import Change, Fleet, rollout_view

KEPT_S = 3600.0  # s of lanes and pauses
LOG_KEPT = 100  # lines
ROLLOUTS_KEPT = 20  # of those that ended; those under way are all kept
PAUSED_SENT = 200  # a wave may pause more; the rest is a number
_AHEAD_S = 1.0  # s that a sender's clock may be ahead before its times are not believed
_BACK_S = 2.0  # s by which the exporter's own clock must go back to be called a jump
_OVER = frozenset({"completed", "aborted"})
_FINAL = frozenset({"completed", "failed", "cancelled"})


class Live:
    """See the module."""

    def __init__(self) -> None:
        self.revision = 1
        self._floor = 1  # something was removed at this revision: who knows less needs everything anew
        self._now = 0.0
        self._head_at = self._rollouts_at = self._paused_at = 1
        self._lanes = LaneBook(self._touch, self._members)
        self._log: deque[tuple[int, Happening]] = deque(maxlen=LOG_KEPT)
        self._rollouts: dict[str, m.RolloutState] = {}
        self._holder: dict[str, str] = {}  # set to the rollout that has it
        self._standing = Standing()
        self._hosts: dict[str, m.HostInventory] = {}
        self._online: dict[str, bool] = {}
        self._vms: dict[str, tuple[str, m.VmRecord]] = {}
        self._coordinator: m.CoordinatorPresence | None = None
        self._broker = "not connected yet"
        self._broker_since = 0.0
        self.alarms = Alarms()

    # -- in -----------------------------------------------------------------------------------------------

    def take(self, received: Received, now: float, *, fresh: bool) -> None:
        """Fold one message, heard at ``now``. ``fresh`` is false for a repetition: then only state counts."""
        self.tick(now)
        message = received.message
        self._state(message, received.header.time.timestamp())
        if fresh:
            self._fact(message)
            line = happening(message, now)
            if line is not None:
                self._say(line)

    def clear(self, topic: str, now: float) -> None:
        """A retained message was removed: its subject is gone."""
        self.tick(now)
        try:
            channel = channel_at(topic)
        except TopicError:
            return
        named = channel.match(topic) or {}
        if channel.message is m.HostInventory:
            self.forget_host(named["host"])
        elif channel.message is m.RolloutState and named["rollout"] in self._rollouts:
            del self._rollouts[named["rollout"]]
            self._rollouts_at = self._touch()

    def connection(self, wrong: str, now: float) -> None:
        """How the exporter's own connection is: empty when well, else what is wrong."""
        self.tick(now)
        if wrong != self._broker:
            if bool(wrong) != bool(self._broker) or not self._broker_since:
                self._broker_since = now
            self._broker = wrong
            self._head_at = self._touch()

    def tick(self, now: float) -> None:
        """Time went on. A clock that was put back takes what was seen with it."""
        if now < self._now - _BACK_S:
            by = now - self._now
            for lane in self._lanes:
                lane.shift(by)
            self._standing.shift(by)
            self._floor = self._touch()
        self._now = now

    def expire(self, now: float) -> None:
        """Forget what is older than ``KEPT_S``; call now and then."""
        self.tick(now)
        if self._lanes.expire(now - KEPT_S):
            self._floor = self._head_at = self._touch()
        if self.alarms.expire(now - KEPT_S):
            self._head_at = self._touch()

    def forget_host(self, host: str) -> None:
        """The host is gone for good."""
        self._online.pop(host, None)
        gone = self._hosts.pop(host, None)
        for record in gone.vms if gone is not None else ():
            self._leave(record, host)
        self._head_at = self._touch()

    # -- out ----------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Change:
        """Everything."""
        return self._tell(0, now, whole=True)

    def since(self, revision: int, now: float) -> Change:
        """What changed after ``revision``; everything where that cannot be told."""
        whole = not self._floor <= revision <= self.revision
        return self._tell(0 if whole else revision, now, whole=whole)

    def _tell(self, after: int, now: float, *, whole: bool) -> Change:
        return Change(
            whole=whole,
            revision=self.revision,
            now=now,
            kept_s=KEPT_S,
            fleet=self._fleet() if self._head_at > after else None,
            rollouts=tuple(rollout_view(each) for each in self._shown())
            if self._rollouts_at > after
            else None,
            paused=self._standing.view(PAUSED_SENT) if self._paused_at > after else None,
            lanes=tuple(lane.view() for lane in self._lanes.since(after)),
            log=tuple(line for revision, line in self._log if revision > after),
        )

    def _fleet(self) -> Fleet:
        coordinator = self._coordinator
        return Fleet(
            broker=self._broker,
            broker_since=self._broker_since,
            coordinator="unknown" if coordinator is None else "online" if coordinator.online else "offline",
            hosts=len(self._hosts.keys() | self._online.keys()),
            hosts_offline=tuple(sorted(host for host, online in self._online.items() if not online)),
            vms=len(self._vms),
            sets=len({lane.set for lane in self._lanes}),
            domains=len(self._lanes),
            paused=len(self._standing),
            full=self._lanes.full,
            alarms=self.alarms.current(),
        )

    def _shown(self) -> list[m.RolloutState]:
        newest = sorted(self._rollouts.values(), key=lambda each: each.created_at, reverse=True)
        open_ones = [each for each in newest if each.status not in _OVER]
        return open_ones or newest[:1]

    # -- state ----------------------------------------------------------------------------------------------

    def _state(self, message: Message, sent: float) -> None:
        match message:
            case m.RolloutState():
                self._rollout(message, sent)
            case m.HostInventory():
                self._inventory(message)
            case m.HostPresence():
                self._presence(message)
            case m.CoordinatorPresence():
                known = self._coordinator
                if known is None or message.epoch >= known.epoch:
                    if known is not None and known.online and not message.online:
                        self._say(Happening(at=self._now, what="coordinator offline", level="warning"))
                    self._coordinator = message
                    self._head_at = self._touch()
            case _:
                pass

    def _presence(self, message: m.HostPresence) -> None:
        if self._online.get(message.host) == message.online:
            return
        if self._online.get(message.host) is not None or not message.online:
            what = "host updater online" if message.online else "host updater offline"
            level = "quiet" if message.online else "warning"
            self._say(Happening(at=self._now, what=what, level=level, host=message.host))  # type: ignore[arg-type]
        self._online[message.host] = message.online
        self._head_at = self._touch()

    def _inventory(self, inventory: m.HostInventory) -> None:
        known = self._hosts.get(inventory.host)
        self._hosts[inventory.host] = inventory
        if known is None or known.vms != inventory.vms:
            stays = {record.vm for record in inventory.vms}
            for record in known.vms if known is not None else ():
                if record.vm not in stays:
                    self._leave(record, inventory.host)
            for record in inventory.vms:
                self._join(record, inventory.host)
            self._head_at = self._touch()
        for record in inventory.vms:
            standing = self._standing.get(record.vm)
            if record.state == "paused" and standing is None:
                place = self._place(record.vm, record.set, record.update_domain)
                self._stand(Paused(record.vm, record.set, *place, inventory.host))
            elif standing is not None and record.state != "paused":
                under_way = standing.operation and inventory.operation == standing.operation
                if not under_way:  # its fact was missed, or there is none: a VM that somebody else paused
                    self._run_again(standing, self._now)

    def _join(self, record: m.VmRecord, host: str) -> None:
        before = self._vms.get(record.vm)
        self._vms[record.vm] = (host, record)
        if before is not None and (before[1].set, before[1].update_domain) != (
            record.set,
            record.update_domain,
        ):
            self._out_of_lane(before[1])
        lane = self._lane(record.set, "update_domain", record.update_domain)
        if lane is not None and record.vm not in lane.vms:
            lane.vms.add(record.vm)
            self._lanes.changed(lane)

    def _leave(self, record: m.VmRecord, host: str) -> None:
        if self._vms.get(record.vm, ("", record))[0] != host:
            return  # it moved: another host has it
        self._vms.pop(record.vm, None)
        self._out_of_lane(record)
        standing = self._standing.get(record.vm)
        if standing is not None:
            self._run_again(standing, self._now)

    def _out_of_lane(self, record: m.VmRecord) -> None:
        lane = self._lane(record.set, "update_domain", record.update_domain)
        if lane is not None:
            lane.vms.discard(record.vm)
            lane.clocks.pop(record.vm, None)
            self._lanes.changed(lane)

    def _rollout(self, rollout: m.RolloutState, sent: float) -> None:
        known = self._rollouts.get(rollout.rollout)
        self._rollouts[rollout.rollout] = rollout
        self._rollouts_at = self._touch()
        over = rollout.status in _OVER
        for name in rollout.sets:
            if not over:
                self._holder[name] = rollout.rollout
        if not (over and known is None):  # one that was over before the exporter came is not drawn
            told = {wave.wave: wave.status for wave in known.waves} if known is not None else {}
            for wave in rollout.waves:
                if told.get(wave.wave) != wave.status:
                    self._wave(rollout, wave, _when(wave, sent))
        if over:
            self._release(rollout, sent)
            ended = sorted(
                (each for each in self._rollouts.values() if each.status in _OVER),
                key=lambda each: each.created_at,
            )
            for each in ended[:-ROLLOUTS_KEPT]:
                del self._rollouts[each.rollout]
        before = known.status if known is not None else "running"
        if rollout.status != before:
            levels = {"completed": "good", "halted": "bad", "aborted": "warning"}
            self._say(
                Happening(
                    at=self._at(sent),
                    what=f"rollout {rollout.status}",
                    level=levels.get(rollout.status, "quiet"),  # type: ignore[arg-type]
                    detail=rollout.reason or rollout.update,
                )
            )

    def _release(self, rollout: m.RolloutState, sent: float) -> None:
        for lane in [each for each in self._lanes if each.rollout == rollout.rollout]:
            if lane.state != "frozen":
                lane.close(self._at(sent))
            lane.rollout, lane.wave, lane.wave_status = "", -1, ""
            self._lanes.changed(lane)
        for name in [name for name, holder in self._holder.items() if holder == rollout.rollout]:
            del self._holder[name]

    def _wave(self, rollout: m.RolloutState, wave: m.WaveState, at: float) -> None:
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
        state = OF_WAVE.get(wave.status)
        lane = self._lane(name, key, domain) if state is not None else None
        if lane is None or state is None:
            return
        same_wave = (lane.rollout, lane.wave) == (rollout, wave.wave)
        if same_wave and lane.wave_status == wave.status:
            return
        if lane.rollout == rollout and lane.wave > wave.wave:
            return  # an earlier wave of this rollout had VMs of the domain, too: the later one counts
        lane.rollout, lane.wave, lane.wave_status = rollout, wave.wave, wave.status
        if not self._standing.any_in(lane.set, lane.key, lane.domain):
            lane.enter(state, self._at(at), not_before=not_before, note=wave.reason)
        self._lanes.changed(lane)

    # -- facts --------------------------------------------------------------------------------------------

    def _fact(self, message: Message) -> None:
        match message:
            case m.WaveChanged():
                rollout = self._rollouts.get(message.rollout)
                # NotBefore comes with the state, so that is waited for.
                if rollout is not None and rollout.status not in _OVER and message.status != "scheduled":
                    for name, domain in message.domains.items():
                        key = rollout.policy.domain_key
                        self._wave_in(name, key, domain, rollout.rollout, message, message.at.timestamp())
            case m.VmFrozen():
                self._frozen(message)
            case m.VmResumed():
                self._resumed(message)
            case m.VmClockSynced():
                self._clock(message)
            case _:
                pass

    def _frozen(self, message: m.VmFrozen) -> None:
        key, domain = self._place(message.vm, message.set, message.update_domain)
        self._stand(
            Paused(
                vm=message.vm,
                set=message.set,
                key=key,
                domain=domain,
                host=message.host,
                operation=message.operation,
                method=message.method,
                since=self._at(message.at.timestamp()),
                budget=message.budget_s,
            )
        )

    def _clock(self, message: m.VmClockSynced) -> None:
        lane = self._lane(message.set, *self._place(message.vm, message.set, message.update_domain))
        if lane is not None:
            verdict = (message.synced, message.error_before_s, message.error_after_s, message.simulated)
            lane.clocks[message.vm] = Clock(message.vm, *verdict)
            self._lanes.changed(lane)
        if self.alarms.clock(message, self._now):
            self._head_at = self._touch()

    def _stand(self, paused: Paused) -> None:
        self._standing.add(paused)
        self._paused_at = self._head_at = self._touch()
        lane = self._lane(paused.set, paused.key, paused.domain)
        if lane is not None:
            lane.enter("frozen", self._now if paused.since is None else paused.since)
            self._lanes.changed(lane)
        clash = self._standing.clash(paused.set)
        if clash:
            self.alarms.two_domains(paused.set, clash, self._now)

    def _resumed(self, message: m.VmResumed) -> None:
        at = self._at(message.at.timestamp())
        standing = self._standing.get(message.vm)
        place = (
            (standing.key, standing.domain)
            if standing is not None
            else self._place(message.vm, message.set, message.update_domain)
        )
        lane = self._lane(message.set, *place)
        if lane is not None:
            seconds, over = round(message.pause_s, 6), not message.within_budget
            guard = message.resumed_by == "guard"
            lane.marks.append(Mark(at, message.vm, seconds, message.budget_s, over, guard))
            if standing is None and lane.state != "frozen":
                # Its beginning was missed: the pause itself says when that was.
                lane.enter("frozen", at - message.pause_s)
                self._go_on(lane, at)
            self._lanes.changed(lane)
        if standing is not None:
            self._run_again(standing, at)
        if self.alarms.resumed(message, self._now):
            self._head_at = self._touch()

    def _run_again(self, paused: Paused, at: float) -> None:
        self._standing.remove(paused.vm)
        self._paused_at = self._head_at = self._touch()
        if not self._standing.clash(paused.set):
            self.alarms.end_two_domains(paused.set, self._now)
        lane = self._lane(paused.set, paused.key, paused.domain)
        still = self._standing.any_in(paused.set, paused.key, paused.domain)
        if lane is not None and lane.state == "frozen" and not still:
            self._go_on(lane, at)
            self._lanes.changed(lane)

    @staticmethod
    def _go_on(lane: Lane, at: float) -> None:
        """No VM of the lane stands still any more."""
        state = OF_WAVE.get(lane.wave_status, "resumed")
        lane.enter("resumed" if state in {"scheduled", "started"} else state, at)
        if not lane.rollout:
            lane.close(at)

    # -- where things are -----------------------------------------------------------------------------------

    def _place(self, vm: str, set_name: str, update_domain: int) -> tuple[DomainKey, int]:
        rollout = self._rollouts.get(self._holder.get(set_name, ""))
        if rollout is not None and rollout.policy.domain_key == "fault_domain" and vm in self._vms:
            return "fault_domain", self._vms[vm][1].fault_domain
        return "update_domain", update_domain

    def _lane(self, set_name: str, key: DomainKey, domain: int) -> Lane | None:
        before = (len(self._lanes), self._lanes.full)
        lane = self._lanes.at(set_name, key, domain)
        if before != (len(self._lanes), self._lanes.full):
            self._head_at = self._touch()
        return lane

    def _members(self, set_name: str, key: DomainKey, domain: int) -> set[str]:
        if key == "update_domain":
            return set()  # those join by their inventory
        records = (record for _, record in self._vms.values())
        return {each.vm for each in records if each.set == set_name and each.fault_domain == domain}

    def _at(self, at: float) -> float:
        return at if self._now - KEPT_S <= at <= self._now + _AHEAD_S else self._now

    # -- what changed ---------------------------------------------------------------------------------------

    def _touch(self) -> int:
        self.revision += 1
        return self.revision

    def _say(self, line: Happening) -> None:
        self._log.append((self._touch(), line))


def _when(wave: m.WaveState, sent: float) -> float:
    """When a wave got its status, as well as the rollout's state says."""
    at: datetime | None = wave.ended_at if wave.status in _FINAL else None
    if wave.status == "started":
        at = wave.started_at
    return at.timestamp() if at is not None else sent
