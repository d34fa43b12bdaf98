"""What the live page shows: a fold of the bus into lanes, rollouts, pauses and a log. Pure.

Everything carries the revision of its last change, so that what changed since any revision can be told without a
queue for each reader. Times are unix seconds, from the messages; a message whose time cannot be right by the exporter's
clock (it lies in the future, or long ago) is drawn where it was heard. Bounded by time (``KEPT_S``) and by count.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from msgspec.structs import replace

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import placed
from caesura_metrics_exporter.alarms import ALARMS_SENT, Alarms
from caesura_metrics_exporter.fleet import is_last_will
from caesura_metrics_exporter.happenings import Happening, Level, happening
from caesura_metrics_exporter.lanebook import LaneBook
from caesura_metrics_exporter.lanes import OF_WAVE, Clock, DomainKey, Lane, Mark
from caesura_metrics_exporter.logbook import LogBook
from caesura_metrics_exporter.standing import Paused, Standing
from caesura_metrics_exporter.views import Change, Fleet, rollout_view

KEPT_S = 3600.0  # s of lanes and pauses
ROLLOUTS_KEPT = 20  # of those that ended; those under way are all kept
PAUSED_SENT = 200  # a wave may pause more; the rest is a number
_AHEAD_S = 1.0  # s that a sender's clock may be ahead before its times are not believed
_JUMP_S = 2.0  # s by which the exporter's own clock must step to be called a jump
_OVER = frozenset({"completed", "aborted"})
_FINAL = frozenset({"completed", "failed", "cancelled"})


class Live:
    """See the module."""

    def __init__(self) -> None:
        self.revision = 1
        self._floor = 1  # something was removed at this revision: who knows less needs everything anew
        self._now = 0.0
        self._ahead: float | None = None  # s, the wall clock minus the monotonic one
        self._head_at = self._rollouts_at = self._paused_at = 1
        self._lanes = LaneBook(self._touch, self._members)
        self._log = LogBook()
        self._rollouts: dict[str, WholeRollout] = {}
        self._holder: dict[str, str] = {}  # set to the rollout that has it
        self._standing = Standing()
        self._hosts: dict[str, m.HostInventory] = {}
        self._online: dict[str, bool] = {}
        self._offline_since: dict[str, float] = {}
        self._vms: dict[str, tuple[str, m.VmRecord]] = {}
        self._coordinator: m.CoordinatorPresence | None = None
        self._broker = "not connected yet"
        self._broker_since = 0.0
        self.alarms = Alarms()

    # -- in -----------------------------------------------------------------------------------------------

    def take(self, received: Received, now: float, mono: float, *, fresh: bool) -> None:
        """Fold one message, heard at ``now``. ``fresh`` is false for a repetition: then only state counts.

        Here and below ``mono`` is the monotonic clock's seconds, by which a jump of the wall clock is seen.
        """
        self.tick(now, mono)
        message = received.message
        self._state(message, received.header.time.timestamp())
        if fresh:
            self._fact(message)
            line = happening(message, now)
            if line is not None:
                self._say(line)

    def recount(self, inventory: m.HostInventory, now: float, mono: float) -> None:
        """An inventory of before counts differently: it is known now whose its VMs are."""
        self.tick(now, mono)
        self._inventory(inventory)

    def clear(self, topic: str, now: float, mono: float) -> None:
        """A retained message was removed: its subject is gone."""
        self.tick(now, mono)
        place = placed(topic)
        if place is None:
            return
        channel, named = place
        if channel.message is m.HostInventory:
            self.forget_host(named["host"])
        elif channel.message is m.HostPresence:
            if named["host"] in self._online and named["host"] not in self._hosts:
                self.forget_host(named["host"])
        elif channel.message is m.VmOwner:
            if self.alarms.agreed(named["vm"], now):
                self._head_at = self._touch()
        elif channel.message is m.RolloutState and named["rollout"] in self._rollouts:
            rollout = self._rollouts.pop(named["rollout"])
            if rollout.status not in _OVER:
                self._release(rollout, now)
            self._rollouts_at = self._touch()

    def connection(self, wrong: str, now: float, mono: float) -> None:
        """How the exporter's own connection is: empty when well, else what is wrong."""
        self.tick(now, mono)
        if wrong != self._broker:
            if bool(wrong) != bool(self._broker) or not self._broker_since:
                self._broker_since = now
            self._broker = wrong
            self._head_at = self._touch()

    def tick(self, now: float, mono: float) -> None:
        """Time went on. A wall clock that jumped takes what was seen with it, so that nothing lasts longer by that."""
        ahead = now - mono
        by = ahead - self._ahead if self._ahead is not None else 0.0
        if abs(by) > _JUMP_S:
            for lane in self._lanes:
                lane.shift(by)
            self._standing.shift(by)
            self.alarms.shift(by)
            self._log.shift(by)
            self._broker_since += by
            self._offline_since = {host: at + by for host, at in self._offline_since.items()}
            self._floor = self._head_at = self._paused_at = self._touch()
        self._ahead = ahead
        self._now = now

    def expire(self, now: float, mono: float) -> None:
        """Forget what is older than ``KEPT_S``; call now and then."""
        self.tick(now, mono)
        for paused in [each for each in self._standing if each.vm not in self._vms]:
            if paused.heard < now - KEPT_S:
                self._lose(paused, f"no word from {paused.host}")
        if self._lanes.expire(now - KEPT_S):
            self._floor = self._head_at = self._touch()
        if self.alarms.expire(now - KEPT_S):
            self._head_at = self._touch()

    def forget_host(self, host: str) -> None:
        """The host is gone for good."""
        self._online.pop(host, None)
        self._offline_since.pop(host, None)
        gone = self._hosts.pop(host, None)
        for record in gone.vms if gone is not None else ():
            self._leave(record, host, f"no word from {host}")
        for paused in [each for each in self._standing if each.host == host]:
            self._lose(paused, f"no word from {host}")
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
            rollouts=tuple(rollout_view(each, self._standing.count_of) for each in self._shown())
            if self._rollouts_at > after
            else None,
            paused=self._standing.view(PAUSED_SENT) if self._paused_at > after else None,
            lanes=tuple(lane.view() for lane in self._lanes.since(after)),
            log=tuple(self._log.since(after)),
        )

    def _fleet(self) -> Fleet:
        coordinator = self._coordinator
        return Fleet(
            broker=self._broker,
            broker_since=self._broker_since,
            coordinator="unknown" if coordinator is None else "online" if coordinator.online else "offline",
            hosts=len(self._hosts.keys() | self._online.keys()),
            hosts_offline=tuple(sorted(self._offline_since)),
            offline_since=dict(self._offline_since),
            vms=len(self._vms),
            sets=len({lane.set for lane in self._lanes}),
            domains=sum(lane.key == "update_domain" for lane in self._lanes),
            paused=len(self._standing),
            full=self._lanes.full,
            alarms=self.alarms.current(),
            alarms_by_rule=self.alarms.counts(),
            alarms_more=max(0, len(self.alarms) - ALARMS_SENT),
        )

    def _shown(self) -> list[WholeRollout]:
        newest = sorted(self._rollouts.values(), key=lambda each: each.created_at, reverse=True)
        open_ones = [each for each in newest if each.status not in _OVER]
        return open_ones or newest[:1]

    # -- state ----------------------------------------------------------------------------------------------

    def _state(self, message: Message, sent: float) -> None:
        match message:
            case WholeRollout():
                self._rollout(message, sent)
            case m.HostInventory():
                self._inventory(message)
            case m.VmOwner():
                if self.alarms.contested(message, self._now):
                    self._head_at = self._touch()
            case m.HostPresence():
                self._presence(message)
            case m.CoordinatorPresence():
                known = self._coordinator
                if known is None or message.epoch >= known.epoch or is_last_will(message):
                    if known is not None and known.online and not message.online:
                        self._say(Happening(at=self._now, what="coordinator offline", level="warning"))
                    epoch = max(message.epoch, known.epoch if known is not None else 0)
                    self._coordinator = replace(message, epoch=epoch)
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
        if message.online:
            self._offline_since.pop(message.host, None)
        else:
            self._offline_since[message.host] = self._now
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
            self._found(record, inventory)

    def _found(self, record: m.VmRecord, inventory: m.HostInventory) -> None:
        standing = self._standing.get(record.vm)
        if record.state == "paused" and standing is None:
            place = self._place(record.vm, record.set, record.update_domain)
            self._stand(
                Paused(record.vm, record.set, record.update_domain, *place, inventory.host, self._now)
            )
        elif standing is not None and record.state != "paused":
            under_way = standing.operation and inventory.operation == standing.operation
            if under_way:
                pass
            elif record.state == "running":  # its fact was missed, or there is none: somebody else paused it
                self._stand_no_more(standing, self._now)
            else:
                self.alarms.stopped(record.vm, record.set, inventory.host, record.state, self._now)
                self._stand_no_more(standing, self._now, "failed")
                self._say_of(standing, f"{record.state} after its pause", "bad")
        changed = [self.alarms.attention(record, inventory.host, self._now)]
        if record.state == "running":
            changed.append(self.alarms.runs(record.vm, self._now))
        if any(changed):
            self._head_at = self._touch()

    def _join(self, record: m.VmRecord, host: str) -> None:
        before = self._vms.get(record.vm)
        self._vms[record.vm] = (host, record)
        if before is not None and _domains(before[1]) != _domains(record):
            self._out_of_lane(before[1])
        self._lane(record.set, "update_domain", record.update_domain)
        for lane in self._lanes_of(record):
            if record.vm not in lane.vms:
                lane.vms.add(record.vm)
                self._lanes.changed(lane)
        if self._standing.get(record.vm) is not None:
            self._put_right(record.set)

    def _leave(self, record: m.VmRecord, host: str, why: str = "gone while it was paused") -> None:
        if self._vms.get(record.vm, ("", record))[0] != host:
            return  # it moved: another host has it
        self._vms.pop(record.vm, None)
        self._out_of_lane(record)
        if self.alarms.gone(record.vm, self._now):
            self._head_at = self._touch()
        standing = self._standing.get(record.vm)
        if standing is not None:
            self._lose(standing, why)

    def _out_of_lane(self, record: m.VmRecord) -> None:
        for lane in self._lanes_of(record):
            lane.vms.discard(record.vm)
            lane.clocks.pop(record.vm, None)
            self._lanes.changed(lane)

    def _lanes_of(self, record: m.VmRecord) -> list[Lane]:
        by_update = self._lanes.get(record.set, "update_domain", record.update_domain)
        by_fault = self._lanes.get(record.set, "fault_domain", record.fault_domain)
        return [lane for lane in (by_update, by_fault) if lane is not None]

    def _rollout(self, rollout: WholeRollout, sent: float) -> None:
        known = self._rollouts.get(rollout.rollout)
        self._rollouts[rollout.rollout] = rollout
        self._rollouts_at = self._touch()
        over = rollout.status in _OVER
        for name in rollout.sets:
            if not over and self._holder.get(name) != rollout.rollout:
                self._holder[name] = rollout.rollout
                self._put_right(name)
        if not (over and known is None):  # one that was over before the exporter came is not drawn
            told = {wave.wave: wave.status for wave in known.waves} if known is not None else {}
            for wave in rollout.waves:
                if told.get(wave.wave) != wave.status:
                    at = _when(wave, sent)
                    self._wave(rollout, wave, at if known is not None else max(at, self._now - KEPT_S))
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
                    detail=": ".join(filter(None, (rollout.update or "freeze on demand", rollout.reason))),
                )
            )

    def _release(self, rollout: WholeRollout, sent: float) -> None:
        for lane in [each for each in self._lanes if each.rollout == rollout.rollout]:
            if lane.state != "frozen":
                lane.close(self._at(sent))
            lane.rollout, lane.wave, lane.wave_status = "", -1, ""
            self._lanes.changed(lane)
        for lane in [each for each in self._lanes if each.waits and each.waits[0] == rollout.rollout]:
            lane.waits = None
            self._lanes.changed(lane)
        for name in [name for name, holder in self._holder.items() if holder == rollout.rollout]:
            del self._holder[name]

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
        lane = self._lane(name, key, domain)
        if lane is None:
            return
        state = OF_WAVE.get(wave.status)
        if state is None:  # it is to come
            lane.waits = (rollout, wave.wave)
            self._lanes.changed(lane)
            return
        if lane.waits == (rollout, wave.wave):
            lane.waits = None
            self._lanes.changed(lane)
        same_wave = (lane.rollout, lane.wave) == (rollout, wave.wave)
        if same_wave and lane.wave_status == wave.status:
            return
        if lane.rollout == rollout and lane.wave > wave.wave:
            return  # an earlier wave of this rollout had VMs of the domain, too: the later one counts
        lane.rollout, lane.wave, lane.wave_status = rollout, wave.wave, wave.status
        long_ago = wave.status in _FINAL and at <= self._now - KEPT_S
        if not lane.standing and not long_ago:
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
                update_domain=message.update_domain,
                key=key,
                domain=domain,
                host=message.host,
                heard=self._now,
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
        lane = self._lane(paused.set, paused.key, paused.domain)
        if lane is not None:
            unknown = paused.since is None
            lane.enter("frozen", self._now if paused.since is None else paused.since, since_unknown=unknown)
        self._counted(paused)
        clash = self._standing.clash(paused.set)
        if clash:
            self.alarms.two_domains(paused.set, clash, self._now)

    def _counted(self, paused: Paused) -> Lane | None:
        """The VMs that stand still changed in this one's lane."""
        self._paused_at = self._head_at = self._touch()
        if self._rollouts:
            self._rollouts_at = self._paused_at
        lane = self._lanes.get(paused.set, paused.key, paused.domain)
        if lane is not None:
            lane.standing = self._standing.count_in(paused.set, paused.key, paused.domain)
            self._lanes.changed(lane)
        return lane

    def _put_right(self, set_name: str) -> None:
        """VMs of the set were placed before it was known which rollout holds it: place them anew."""
        clashed = self._standing.clash(set_name)
        for paused in self._standing.of(set_name):
            key, domain = self._place(paused.vm, paused.set, paused.update_domain)
            if (key, domain) == (paused.key, paused.domain):
                continue
            self._standing.remove(paused.vm)
            lane = self._counted(paused)
            if lane is not None and not lane.standing:
                lane.take_back()
            self._stand(replace(paused, key=key, domain=domain))
        if clashed and not self._standing.clash(set_name):
            self.alarms.end_two_domains(set_name, self._now, mistaken=True)

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
            lane.mark(Mark(round(at, 3), message.vm, seconds, message.budget_s, over, guard))
            if standing is None and lane.state != "frozen":
                # Its beginning was missed: the pause itself says when that was.
                lane.enter("frozen", at - message.pause_s)
                self._go_on(lane, at)
                if not lane.rollout:
                    lane.close(at)
            self._lanes.changed(lane)
        if standing is not None:
            self._stand_no_more(standing, at)
        if self.alarms.resumed(message, self._now):
            self._head_at = self._touch()

    def _stand_no_more(
        self, paused: Paused, at: float, how: Literal["resumed", "failed", "lost"] = "resumed"
    ) -> None:
        self._standing.remove(paused.vm)
        lane = self._counted(paused)
        if not self._standing.clash(paused.set):
            self.alarms.end_two_domains(paused.set, self._now)
        if lane is None or lane.state != "frozen" or lane.standing:
            return
        if how == "resumed":
            self._go_on(lane, at)
        elif how == "failed":
            lane.enter("failed", at)
        if how == "lost" or not lane.rollout:
            lane.close(at)

    def _lose(self, paused: Paused, why: str) -> None:
        """Nothing more will be heard of it."""
        self._stand_no_more(paused, self._now, "lost")
        self._say_of(paused, why, "warning")

    @staticmethod
    def _go_on(lane: Lane, at: float) -> None:
        """No VM of the lane stands still any more."""
        state = OF_WAVE.get(lane.wave_status, "resumed")
        lane.enter("resumed" if state in {"scheduled", "started"} else state, at)

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
        self._log.add(self._touch(), line)

    def _say_of(self, paused: Paused, what: str, level: Level) -> None:
        of = paused
        self._say(Happening(self._now, what, level, of.set, of.update_domain, of.vm, of.host))


def _when(wave: m.WaveState, sent: float) -> float:
    """When a wave got its status, as well as the rollout's state says."""
    at: datetime | None = wave.ended_at if wave.status in _FINAL else None
    if wave.status == "started":
        at = wave.started_at
    return at.timestamp() if at is not None else sent


def _domains(record: m.VmRecord) -> tuple[str, int, int]:
    return record.set, record.update_domain, record.fault_domain
