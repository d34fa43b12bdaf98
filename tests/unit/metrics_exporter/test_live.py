"""What the live page shows, from what the bus says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.envelope import Header, Message
from caesura.contract.parts import WholeRollout
from caesura.contract.topics import channel_of
from caesura.lifecycle.proof import memory_proof
from caesura_metrics_exporter.live.activity import log_entry
from caesura_metrics_exporter.live.activity_log import LOG_KEPT, WRONG_KEPT
from caesura_metrics_exporter.live.alarms import ALARMS_KEPT, ALARMS_SENT
from caesura_metrics_exporter.live.page_json import Delta
from caesura_metrics_exporter.live.page_state import KEPT_S, PAUSED_SENT, ROLLOUTS_KEPT, LivePageState
from caesura_metrics_exporter.live.timeline_store import LANES_KEPT
from caesura_metrics_exporter.live.timelines import (
    MARKS_IDLE,
    MARKS_KEPT,
    MARKS_SENT,
    SEGMENTS_IDLE,
    SEGMENTS_KEPT,
    LaneView,
)
from caesura_testing.rollouts import wave_state, whole_rollout

T0 = 1_790_000_000.0
OPEN: tuple[m.WaveStatus, ...] = ("pending", "scheduled", "started", "verifying", "soaking")


def when(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def received(message: Message, sent: float) -> Received:
    header = Header(specversion="1.0", id="1", source="/test", type=type(message).TYPE, time=when(sent))
    kind = m.RolloutState if isinstance(message, WholeRollout) else type(message)
    return Received(channel_of(kind), {}, header, message)


class Story:
    """A live fold, and messages in few words. ``at`` is seconds after ``T0`` by the exporter's wall clock."""

    def __init__(self) -> None:
        self.live = LivePageState()
        self.stepped = 0.0  # s that the wall clock was put ahead since T0
        self.waves: dict[int, m.WaveState] = {}

    def hear(self, message: Message, at: float, *, sent: float | None = None, fresh: bool = True) -> None:
        self.live.take(received(message, T0 + (at if sent is None else sent)), *self.clocks(at), fresh=fresh)

    def clocks(self, at: float) -> tuple[float, float]:
        """The wall and the monotonic clock."""
        return T0 + at, at - self.stepped

    def step(self, at: float, by: float) -> None:
        """At ``at`` the wall clock is put ahead."""
        self.stepped += by
        self.live.tick(*self.clocks(at + by))

    def expire(self, at: float) -> None:
        self.live.expire(*self.clocks(at))

    def clear(self, topic: str, at: float) -> None:
        self.live.clear(topic, *self.clocks(at))

    def log(self) -> list[str]:
        return [line.what for line in self.snapshot().log]

    def inventory(self, at: float, host: str = "h1", state: m.VmState = "running", **more: Any) -> None:
        number = int(host[1:])
        record = m.VmRecord(vm=f"web-{number}", set="web", update_domain=number - 1, state=state)
        given = {"vms": (record,), **more}
        self.hear(m.HostInventory(host=host, driver="process", epoch=1, **given), at)

    def rollout(self, at: float, status: m.RolloutStatus = "running", **more: Any) -> None:
        given = {"policy": m.Policy(), "sets": ("web",), "rollout": "r1", "created_at": when(T0), **more}
        waves = tuple(self.waves[index] for index in sorted(self.waves))
        self.hear(whole_rollout(update="patch", status=status, waves=waves, **given), at)

    def wave(self, at: float, status: m.WaveStatus, index: int = 0, **more: Any) -> None:
        """The coordinator says both: the fact, then the rollout's state."""
        domains = more.pop("domains", {"web": index})
        self.waves[index] = wave_state(
            wave=index, status=status, domains=domains, hosts=("h1",), vms=("web-1",), **more
        )
        reason = more.get("reason", "")
        changed = m.WaveChanged(
            rollout="r1", wave=index, status=status, domains=domains, at=when(T0 + at), reason=reason
        )
        self.hear(changed, at)
        self.rollout(at)

    def frozen(self, at: float, vm: str = "web-1", domain: int = 0, **more: Any) -> None:
        sent = more.pop("sent", at)
        message = m.VmFrozen(
            vm=vm,
            host=more.pop("host", "h1"),
            set=more.pop("set", "web"),
            update_domain=domain,
            operation=more.pop("operation", "op1"),
            method="freeze",
            budget_s=5,
            at=when(T0 + sent),
        )
        self.hear(message, at, **more)

    def resumed(self, at: float, pause_s: float, vm: str = "web-1", domain: int = 0, **more: Any) -> None:
        fresh = more.pop("fresh", True)
        given = {"within_budget": True, "resumed_by": "updater", "set": "web", "operation": "op1", **more}
        message = m.VmResumed(
            vm=vm,
            host="h1",
            update_domain=domain,
            method="freeze",
            pause_s=pause_s,
            budget_s=5,
            at=when(T0 + at),
            **given,
        )
        self.hear(message, at, fresh=fresh)

    def snapshot(self, at: float = 0.0) -> Delta:
        return self.live.snapshot(max(self.live.now, T0 + at))

    def lane(self, name: str = "web/ud/0") -> LaneView:
        return {lane.lane: lane for lane in self.snapshot().lanes}[name]

    def drawn(self, name: str = "web/ud/0") -> list[tuple[str, float, float | None]]:
        """(state, start, end) of a lane's stretches, in seconds after T0."""
        return [
            (each.state, round(each.start - T0, 3), None if each.end is None else round(each.end - T0, 3))
            for each in self.lane(name).segments
        ]

    def alarms(self) -> list[tuple[str, bool]]:
        """(rule, whether it lasts)."""
        fleet = self.snapshot().fleet
        assert fleet is not None
        return [(alarm.rule, alarm.until is None) for alarm in fleet.alarms]


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_lane_walks_through_the_states_and_ends_with_the_rollout(story: Story) -> None:
    story.inventory(0)
    story.wave(1, "scheduled", not_before=when(T0 + 9))
    story.wave(3, "started", started_at=when(T0 + 3))
    story.frozen(4)
    story.resumed(6, 2.0)
    story.wave(6.5, "verifying")
    story.wave(7, "soaking")
    story.wave(8, "completed", ended_at=when(T0 + 8))
    assert story.drawn() == [
        ("scheduled", 1, 3),
        ("started", 3, 4),
        ("frozen", 4, 6),
        ("resumed", 6, 8),
        ("verified", 8, None),
    ]
    assert story.lane().segments[0].not_before == T0 + 9
    story.rollout(10, "completed", ended_at=when(T0 + 10))
    assert story.drawn()[-1] == ("verified", 8, 10)
    assert story.lane().state == ""
    pauses = story.lane().pauses
    assert pauses is not None
    assert (pauses.count, pauses.least, pauses.median, pauses.most) == (1, 2.0, 2.0, 2.0)
    assert [line.what for line in story.snapshot().log] == [
        "wave 1 scheduled",
        "wave 1 started",
        "frozen",
        "resumed",
        "wave 1 verifying",
        "wave 1 soaking",
        "wave 1 completed",
        "rollout completed",
    ]


def test_what_a_host_says_is_wrong_with_a_vm_is_shown_while_it_lasts(story: Story) -> None:
    def record(detail: str) -> m.VmRecord:
        return m.VmRecord(vm="web-1", set="web", update_domain=0, state="running", state_detail=detail)

    story.inventory(0, vms=(record(""),))
    assert story.alarms() == []
    for at in (1, 2):
        story.inventory(at, vms=(record("/bin/web was ended by SIGKILL"),))
        assert story.alarms() == [("attention", True)]
    fleet = story.snapshot().fleet
    assert fleet is not None
    assert "web-1 (web) on h1 is running: /bin/web was ended by SIGKILL" in fleet.alarms[0].text
    story.inventory(3, vms=(record(""),))
    assert story.alarms() == [("attention", False)]


def test_a_vm_in_no_set_is_named_without_one(story: Story) -> None:
    record = m.VmRecord(vm="solo", set="_solo", update_domain=0, state="running", state_detail="it is ill")
    story.inventory(0, vms=(record,))
    story.resumed(1, 9.0, vm="solo", set="_solo", within_budget=False)
    fleet = story.snapshot().fleet
    assert fleet is not None
    assert [each.text for each in fleet.alarms] == [
        "solo on h1 is running: it is ill",
        "solo on h1 was paused for 9.0 s, its budget was 5 s",
    ]


def test_the_log_names_what_a_rollout_was_about(story: Story) -> None:
    story.rollout(0)
    story.rollout(1, "halted", reason="h1 failed")
    story.rollout(2, "aborted", reason="given up")
    assert [each.detail for each in story.snapshot().log] == ["patch: h1 failed", "patch: given up"]


def test_the_rollout_is_told_with_its_waves(story: Story) -> None:
    story.wave(1, "completed", 0)
    story.wave(2, "scheduled", 1, events={"web": "e1"}, approved=("web",))
    (rollout,) = story.snapshot().rollouts or ()
    assert (rollout.update, rollout.status, rollout.counts) == (
        "patch",
        "running",
        {"completed": 1, "scheduled": 1},
    )
    assert [(wave.status, wave.domains, wave.approved, wave.events) for wave in rollout.waves] == [
        ("completed", {"web": 0}, 0, 0),
        ("scheduled", {"web": 1}, 1, 1),
    ]


def test_a_domain_is_frozen_until_its_last_vm_runs(story: Story) -> None:
    story.wave(0, "started")
    story.frozen(1, "web-1")
    story.frozen(1.5, "web-9")
    story.resumed(3, 2.0, "web-1")
    assert story.lane().state == "frozen"
    assert [each.vm for each in story.snapshot().paused or ()] == ["web-9"]
    story.wave(3.5, "verifying")
    assert story.lane().state == "frozen", "a wave's word does not make a VM run"
    story.resumed(4, 2.5, "web-9")
    assert story.drawn()[1:] == [("frozen", 1, 4), ("resumed", 4, None)]
    assert story.snapshot().paused == ()


def test_a_repeated_fact_is_drawn_and_told_once(story: Story) -> None:
    for fresh in (True, False):
        story.frozen(1, fresh=fresh)
        if fresh:
            story.resumed(2, 1.0)
    story.resumed(2.5, 1.0, fresh=False)
    assert len(story.lane().marks) == 1
    assert story.snapshot().paused == (), "the repetition of a freeze came after the resume"
    assert [line.what for line in story.snapshot().log] == ["frozen", "resumed"]


def test_a_pause_whose_beginning_was_missed_is_drawn_from_its_length(story: Story) -> None:
    story.wave(0, "started")
    story.resumed(5, 2.0)
    assert story.drawn() == [("started", 0, 3), ("frozen", 3, 5), ("resumed", 5, None)]


def test_a_pause_without_a_rollout_leaves_nothing_open(story: Story) -> None:
    story.frozen(1)
    story.resumed(2, 1.0)
    assert story.lane().state == ""
    assert story.drawn()[0] == ("frozen", 1, 2)


class TestAlarms:
    """What the page says loudly."""

    def test_two_domains_of_a_set_at_once(self, story: Story) -> None:
        story.frozen(1, "web-1", 0)
        assert story.alarms() == []
        story.frozen(2, "web-2", 1)
        story.frozen(2, "db-1", 1, set="db")
        assert story.alarms() == [("two-domains", True)]
        story.resumed(3, 1.0, "web-2", 1)
        assert story.alarms() == [("two-domains", False)]

    def test_two_sets_may_stand_still_at_once(self, story: Story) -> None:
        story.frozen(1, "web-1", 0)
        story.frozen(1, "db-1", 1, set="db")
        assert story.alarms() == []

    def test_a_fact_of_the_past_is_not_held_against_an_inventory_of_now(self, story: Story) -> None:
        story.inventory(10, "h2", "paused")
        story.frozen(10, "web-1", 0, sent=1)
        story.resumed(10, 2.0, "web-1", 0)
        assert story.alarms() == []

    def test_two_inventories_that_say_so_are_believed(self, story: Story) -> None:
        story.inventory(10, "h1", "paused")
        story.inventory(10, "h2", "paused")
        assert story.alarms() == [("two-domains", True)]

    def test_overrun_guard_and_broken_memory(self, story: Story) -> None:
        broken = m.MemoryProof(proof="digest", ok=False)
        story.frozen(1)
        story.resumed(8, 7.0, within_budget=False, resumed_by="guard", memory=broken)
        assert sorted(story.alarms()) == [("guard", False), ("memory", False), ("overrun", False)]
        (mark,) = story.lane().marks
        assert (mark.over, mark.guard) == (True, True)
        assert story.snapshot().log[-1].level == "bad"

    def test_a_canary_that_differs_is_an_alarm_though_the_clock_is_right(self, story: Story) -> None:
        """What the guest itself shows comes with its clock, after `resumed`: nothing was said of it on the page."""
        story.inventory(0)
        verdict = m.VmClockSynced(
            vm="web-1",
            host="h1",
            set="web",
            update_domain=0,
            synced=True,
            by="agent",
            error_after_s=0.001,
            memory=memory_proof(["not_rebooted"], ["canary_equal"], "2 pages"),
            at=when(T0 + 1),
        )
        story.hear(verdict, 1)
        assert story.alarms() == [("memory", False)]
        entry = story.snapshot().log[-1]
        assert entry.level == "bad"
        assert "canary differs" in entry.detail
        assert "not rebooted" in entry.detail

    def test_a_clock_that_is_not_synced_until_it_is(self, story: Story) -> None:
        def verdict(*, synced: bool, at: float) -> m.VmClockSynced:
            return m.VmClockSynced(
                vm="web-1",
                host="h1",
                set="web",
                update_domain=0,
                synced=synced,
                by="agent",
                error_before_s=-2.0,
                error_after_s=-0.5 if not synced else 0.001,
                at=when(T0 + at),
            )

        story.inventory(0)
        story.hear(verdict(synced=False, at=1), 1)
        assert story.alarms() == [("clock", True)]
        assert story.lane().unsynced == 1
        story.hear(verdict(synced=True, at=2), 2)
        assert story.alarms() == [("clock", False)]
        clock = story.lane().clock
        assert clock is not None
        assert (story.lane().unsynced, clock.after) == (0, 0.001)
        before = story.live.revision
        story.expire(3 + KEPT_S)
        assert story.alarms() == []
        assert story.live.since(before, T0).fleet is not None, "that it is gone is told"

    def test_the_clock_of_a_vm_that_is_gone_worries_nobody(self, story: Story) -> None:
        story.inventory(0)
        verdict = m.VmClockSynced(
            vm="web-1", host="h1", set="web", update_domain=0, synced=False, by="agent", at=when(T0 + 1)
        )
        story.hear(verdict, 1)
        story.inventory(2, vms=())
        assert story.alarms() == [("clock", False)]
        assert story.lane().unsynced == 0

    def test_what_lasts_is_not_pushed_out_and_comes_first(self, story: Story) -> None:
        story.frozen(1, "web-1", 0)
        story.frozen(1, "web-2", 1)
        for number in range(2 * ALARMS_KEPT):
            story.resumed(2 + number, 0.5, f"db-{number}", set="db", resumed_by="guard")
        story.resumed(900, 9.0, "db-0", set="db", within_budget=False)
        assert story.alarms()[:3] == [("two-domains", True), ("overrun", False), ("guard", False)]
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert (len(fleet.alarms), fleet.alarms_more) == (ALARMS_SENT, ALARMS_KEPT - ALARMS_SENT)
        assert fleet.alarms[2].about == f"db-{2 * ALARMS_KEPT - 1}", "the newest of those that are over"

    def test_one_that_repeats_while_it_lasts_is_one(self, story: Story) -> None:
        for number, domain in enumerate((0, 1, 2)):
            story.frozen(1 + number, f"web-{number}", domain)
        fleet = story.snapshot().fleet
        assert fleet is not None
        (alarm,) = fleet.alarms
        assert (alarm.at, alarm.text.startswith("VMs of domains 0 and 1 and 2 ")) == (T0 + 2, True)


class TestState:
    """What is retained restores the present; what is gone is forgotten."""

    def test_a_vm_that_only_its_inventory_calls_paused(self, story: Story) -> None:
        story.inventory(1, state="paused")
        (paused,) = story.snapshot().paused or ()
        assert (paused.vm, paused.since, paused.budget) == ("web-1", None, None)
        story.inventory(5)
        assert story.snapshot().paused == ()
        assert story.lane().state == ""

    def test_an_older_inventory_of_the_operation_does_not_end_its_pause(self, story: Story) -> None:
        story.inventory(0)
        story.frozen(1)
        story.inventory(1.01, operation="op1")
        assert story.lane().state == "frozen"
        story.inventory(9)
        assert story.lane().state == "", "an idle host whose VM runs: the fact was missed"

    def test_a_rollout_under_way_is_restored_from_its_state(self, story: Story) -> None:
        story.waves = {
            0: wave_state(
                wave=0, status="started", domains={"web": 0}, hosts=(), vms=(), started_at=when(T0 - 5)
            )
        }
        story.rollout(0)
        assert story.drawn() == [("started", -5, None)]

    def test_a_rollout_that_was_over_is_told_but_not_drawn(self, story: Story) -> None:
        story.waves = {
            0: wave_state(
                wave=0, status="completed", domains={"web": 0}, hosts=(), vms=(), ended_at=when(T0 - 5)
            )
        }
        story.rollout(0, "completed")
        assert story.snapshot().lanes == ()
        assert [each.status for each in story.snapshot().rollouts or ()] == ["completed"]

    def test_a_halt_keeps_the_failed_stretch_until_it_goes_on(self, story: Story) -> None:
        story.wave(1, "started")
        story.wave(2, "failed", reason="web-1 did not come back", ended_at=when(T0 + 2))
        story.rollout(2, "halted", reason="web-1 did not come back")
        assert story.drawn()[-1] == ("failed", 2, None)
        assert story.lane().segments[-1].note == "web-1 did not come back"
        assert story.snapshot().log[-1].what == "rollout halted"
        story.wave(8, "scheduled")
        assert story.drawn()[-2:] == [("failed", 2, 8), ("scheduled", 8, None)]

    def test_fault_domains_are_lanes_where_a_rollout_goes_by_them(self, story: Story) -> None:
        record = m.VmRecord(vm="web-1", set="web", update_domain=7, fault_domain=1, state="running")
        story.inventory(0, vms=(record,))
        policy = m.Policy(domain_key="fault_domain")
        story.waves = {0: wave_state(wave=0, status="started", domains={"web": 1}, hosts=(), vms=("web-1",))}
        story.rollout(1, policy=policy)
        story.frozen(2, domain=7)
        assert story.lane("web/fd/1").state == "frozen"
        assert story.lane("web/fd/1").vms == 1
        story.rollout(3, "aborted", policy=policy)
        story.resumed(4, 2.0, domain=7)
        assert story.lane("web/fd/1").state == "", "it ends where it began"

    def test_a_host_that_is_gone_takes_its_vms_along(self, story: Story) -> None:
        story.inventory(0)
        story.frozen(1)
        before = story.live.revision
        story.clear("caesura/v1/host/h1/inventory", 2)
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert (fleet.hosts, fleet.vms, fleet.paused) == (0, 0, 0)
        story.expire(3 + KEPT_S)
        assert story.snapshot().lanes == ()
        assert story.live.since(before, T0 + KEPT_S).whole, "a lane vanished: who knew it starts anew"

    def test_a_vm_that_moved_belongs_to_the_other_host(self, story: Story) -> None:
        record = m.VmRecord(vm="web-1", set="web", update_domain=0, state="running")
        story.inventory(0, "h1", vms=(record,))
        story.inventory(1, "h2", vms=(record,))
        story.inventory(2, "h1", vms=())
        assert story.lane().vms == 1

    def test_a_vm_that_changed_its_domain(self, story: Story) -> None:
        for at, domain in enumerate((0, 3)):
            record = m.VmRecord(vm="web-1", set="web", update_domain=domain, state="running")
            story.inventory(at, vms=(record,))
        assert (story.lane("web/ud/0").vms, story.lane("web/ud/3").vms) == (0, 1)

    def test_a_removed_rollout_is_not_shown(self, story: Story) -> None:
        story.rollout(0, "completed")
        story.clear("caesura/v1/fleet/rollout/r1", 1)
        story.clear("no/topic/of/ours", 1)
        assert story.snapshot().rollouts == ()

    def test_presence_and_connection(self, story: Story) -> None:
        for online in (True, False, False):
            story.hear(m.HostPresence(host="h1", online=online, instance="i"), 0)
        story.hear(m.CoordinatorPresence(coordinator="c", epoch=2, online=True), 0)
        story.hear(m.CoordinatorPresence(coordinator="b", epoch=1, online=False), 0)
        story.live.connection("", *story.clocks(1))
        story.live.connection("not connected: refused", *story.clocks(2))
        story.live.connection("not connected: timeout", *story.clocks(3))
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert fleet.hosts_offline == ("h1",)
        assert fleet.coordinator == "online", "the older one does not speak for the new one"
        assert (fleet.broker, fleet.broker_since) == ("not connected: timeout", T0 + 2)
        assert [line.what for line in story.snapshot().log] == ["host updater offline"]

    def test_coordinators_that_share_a_store(self, story: Story) -> None:
        def standby() -> str:
            fleet = story.snapshot().fleet
            assert fleet is not None
            return fleet.standby

        assert standby() == ""
        story.hear(m.CoordinatorStatus(coordinator="one", online=True, leads=True, epoch=2), 0)
        assert standby() == "no other stands by"
        story.hear(m.CoordinatorStatus(coordinator="two", online=True, leads=False, waits_for="its turn"), 1)
        assert standby() == "two standing by"
        story.hear(m.CoordinatorStatus(coordinator="one", online=True, leads=True, waits_for="the store"), 2)
        assert standby() == "rollouts wait for the store"
        story.hear(m.CoordinatorStatus(coordinator="one", online=False, leads=False), 3)
        story.hear(m.CoordinatorStatus(coordinator="two", online=True, leads=True, epoch=3), 3)
        assert standby() == "no other stands by"
        story.hear(m.CoordinatorStatus(coordinator="one", online=True, leads=False, waits_for="its turn"), 4)
        assert standby() == "one standing by"
        story.hear(m.CoordinatorStatus(coordinator="two", online=True, leads=True, epoch=3), 60)
        story.live.expire(*story.clocks(70))
        revision = story.live.revision
        assert standby() == "one standing by"
        story.live.expire(*story.clocks(80))
        assert story.live.revision > revision, "readers of the page are told"
        assert standby() == "no other stands by", "it is not announced any more"


FD = m.Policy(domain_key="fault_domain")


def in_fault_domain(number: int, fault_domain: int, state: m.VmState = "running") -> m.VmRecord:
    return m.VmRecord(
        vm=f"web-{number}", set="web", update_domain=number, fault_domain=fault_domain, state=state
    )


class TestFaultDomains:
    """Which rollout holds a set may be known later than which of its VMs stand still."""

    def fleet(self, story: Story) -> None:
        for number in (0, 1):
            story.inventory(1, f"h{number + 1}", vms=(in_fault_domain(number, 2, "paused"),))

    def test_a_rollout_that_is_heard_of_later_puts_it_right(self, story: Story) -> None:
        self.fleet(story)
        assert story.alarms() == [("two-domains", True)]
        story.waves = {0: wave_state(wave=0, status="started", domains={"web": 2}, hosts=(), vms=())}
        story.rollout(1.1, policy=FD)
        assert story.alarms() == [], "it never was so"
        assert {each.domain for each in story.snapshot().paused or ()} == {2}
        states = {lane.lane: (lane.state, lane.standing) for lane in story.snapshot().lanes}
        assert states == {"web/ud/0": ("", 0), "web/ud/1": ("", 0), "web/fd/2": ("frozen", 2)}
        assert story.drawn("web/ud/0") == []
        for number in (0, 1):
            story.inventory(3, f"h{number + 1}", vms=(in_fault_domain(number, 2),))
        assert story.lane("web/fd/2").state == "resumed"

    def test_an_inventory_that_is_heard_of_later_puts_it_right(self, story: Story) -> None:
        story.rollout(0, policy=FD)
        story.frozen(1, "web-0", 0)
        story.frozen(1, "web-1", 1)
        self.fleet(story)
        assert story.alarms() == []
        assert story.lane("web/fd/2").standing == 2

    def test_a_clash_that_is_real_stays(self, story: Story) -> None:
        story.inventory(1, "h1", vms=(in_fault_domain(0, 1, "paused"),))
        story.inventory(1, "h2", vms=(in_fault_domain(1, 2, "paused"),))
        story.rollout(2, policy=FD)
        assert story.alarms() == [("two-domains", True)]

    def test_domains_of_two_keys_are_not_compared(self, story: Story) -> None:
        story.inventory(0, "h1", vms=(in_fault_domain(0, 1),))
        story.rollout(1, policy=FD)
        story.frozen(2, "web-0", 0)
        story.frozen(2, "web-7", 7)  # no inventory says what fault domain it is in
        assert story.alarms() == []

    def test_their_lanes_go_with_what_is_drawn_of_them(self, story: Story) -> None:
        story.inventory(0, vms=(in_fault_domain(0, 1),))
        story.waves = {0: wave_state(wave=0, status="started", domains={"web": 1}, hosts=(), vms=())}
        story.rollout(1, policy=FD)
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert (len(story.snapshot().lanes), fleet.domains) == (2, 1), "a domain is counted once"
        assert story.lane("web/fd/1").vms == 1
        story.expire(2 * KEPT_S)
        assert story.lane("web/fd/1").state == "started", "it is under way"
        story.rollout(2 * KEPT_S, "aborted", policy=FD)
        story.expire(4 * KEPT_S)
        assert [lane.lane for lane in story.snapshot().lanes] == ["web/ud/0"]

    def test_a_vm_that_leaves_leaves_both(self, story: Story) -> None:
        story.inventory(0, vms=(in_fault_domain(0, 1), in_fault_domain(1, 1)))
        story.waves = {0: wave_state(wave=0, status="started", domains={"web": 1}, hosts=(), vms=())}
        story.rollout(1, policy=FD)
        story.inventory(2, vms=(in_fault_domain(0, 1),))
        assert (story.lane("web/fd/1").vms, story.lane("web/ud/1").vms) == (1, 0)


class TestPauses:
    """What is said of pauses is true of all of them."""

    def test_the_longest_of_many_is_told(self, story: Story) -> None:
        story.resumed(1, 9.9, "web-0", within_budget=False)
        story.resumed(2, 7.0, "web-1", resumed_by="guard")
        for number in range(2, 300):
            story.resumed(3 + number, 1.0 if number else 0.5, f"web-{number}")
        pauses = story.lane().pauses
        assert pauses is not None
        assert (pauses.count, pauses.least, pauses.most, pauses.over) == (300, 1.0, 9.9, 1)
        assert [mark.vm for mark in story.lane().marks[:2]] == ["web-0", "web-1"]
        story.expire(KEPT_S + 63)
        pauses = story.lane().pauses
        assert pauses is not None
        assert (pauses.most, pauses.over) == (1.0, 0), "what is older than an hour does not count"

    def test_swaps_one_after_another_do_not_push_the_beginning_out(self, story: Story) -> None:
        story.wave(0, "scheduled")
        story.wave(1, "started")
        for number in range(60):
            story.frozen(2 + number, f"web-{number}")
            story.resumed(2.003 + number, 0.003, f"web-{number}")
        drawn = story.drawn()
        assert [state for state, _, _ in drawn[:3]] == ["scheduled", "started", "frozen"]
        assert story.lane().segments[2].note == "several pauses, one after another"
        assert drawn[-1] == ("resumed", 61.003, None)
        assert len(drawn) <= SEGMENTS_KEPT

    def test_each_wave_counts_its_own(self, story: Story) -> None:
        started: dict[str, Any] = {"status": "started", "hosts": (), "wave": 0}
        for name, vms in (("web", ("web-1",)), ("db", ("db-1", "db-2"))):
            story.waves = {0: wave_state(domains={name: 0}, vms=vms, **started)}
            story.rollout(0, rollout=name, sets=(name,))
        story.frozen(1, "db-1", set="db")
        before = story.live.revision
        story.frozen(1, "db-2", set="db")
        told = story.live.since(before, T0 + 1).rollouts or ()
        assert {each.rollout: each.waves[0].standing for each in told} == {"web": 0, "db": 2}

    def test_more_than_are_named_are_counted(self, story: Story) -> None:
        for number in range(PAUSED_SENT + 100):
            story.frozen(1, f"web-{number}")
        assert story.lane().standing == PAUSED_SENT + 100
        story.resumed(2, 1.0, "web-0")
        assert story.lane().standing == PAUSED_SENT + 99

    def test_those_come_first_whose_budget_ends_first(self, story: Story) -> None:
        for number, at in enumerate((5, 2, 4)):
            story.frozen(5, f"web-{number}", sent=at)
        story.frozen(6, "web-9")
        assert [each.vm for each in story.snapshot().paused or ()] == ["web-1", "web-2", "web-0", "web-9"]

    def test_a_host_whose_clock_is_behind_makes_no_pause_longer(self, story: Story) -> None:
        story.frozen(100, sent=40)
        (paused,) = story.snapshot().paused or ()
        assert (paused.since, paused.or_earlier) == (T0 + 100, True)
        story.frozen(101, sent=100.5)
        (paused,) = story.snapshot().paused or ()
        assert (paused.since, paused.or_earlier) == (T0 + 101, False)

    @pytest.mark.parametrize(
        ("state", "text"), [("stopped", "is stopped after"), ("unknown", "is in an unknown state after")]
    )
    def test_a_vm_that_does_not_run_after_its_pause(self, story: Story, state: m.VmState, text: str) -> None:
        story.inventory(0)
        story.wave(0.5, "started")
        story.frozen(1)
        story.inventory(2, state=state, operation="op1")
        assert story.lane().state == "frozen", "its operation is under way: some methods stop it"
        story.inventory(3, state=state)
        assert story.drawn()[-1] == ("failed", 3, None)
        assert story.snapshot().paused == ()
        assert story.alarms() == [("stopped", True)]
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert text in fleet.alarms[0].text
        assert story.log()[-1] == f"{state} after its pause"
        story.inventory(9)
        assert story.alarms() == [("stopped", False)]

    def test_a_host_that_is_forgotten_in_a_pause_resumed_nothing(self, story: Story) -> None:
        story.inventory(0)
        story.wave(0.5, "started")
        story.frozen(1)
        story.live.forget_host("h1")
        assert story.drawn() == [("started", 0.5, 1), ("frozen", 1, 1)]
        assert story.snapshot().paused == ()
        assert story.log()[-1] == "no word from h1"

    def test_a_vm_that_no_inventory_knows_does_not_stand_for_ever(self, story: Story) -> None:
        story.frozen(1, host="h8")
        story.frozen(1, "web-2", host="h9")
        story.live.forget_host("h8")
        assert [each.vm for each in story.snapshot().paused or ()] == ["web-2"]
        story.expire(KEPT_S)
        assert [each.vm for each in story.snapshot().paused or ()] == ["web-2"]
        story.expire(KEPT_S + 2)
        assert story.snapshot().paused == ()
        assert story.log()[-2:] == ["no word from h8", "no word from h9"]

    def test_since_when_is_not_known(self, story: Story) -> None:
        story.inventory(5, state="paused")
        assert story.lane().segments[-1].since_unknown
        story.frozen(6, "web-7", sent=4)
        assert not story.lane().segments[-1].since_unknown
        assert story.drawn() == [("frozen", 4, None)]


class TestWaves:
    """Where a domain is in its rollout."""

    def test_every_domain_is_told_what_it_waits_for(self, story: Story) -> None:
        domains = {f"s{number}": 1 for number in range(20)}
        story.wave(1, "pending", 1, domains=domains)
        assert [story.lane(f"s{number}/ud/1").waits for number in (0, 19)] == [1, 1]
        story.wave(2, "scheduled", 1, domains={"s0": 1})
        assert story.lane("s0/ud/1").waits is None
        story.rollout(3, "aborted")
        assert story.lane("s19/ud/1").waits is None

    def test_what_ended_long_before_the_exporter_came_is_not_drawn_as_new(self, story: Story) -> None:
        done: dict[str, Any] = {"status": "completed", "hosts": (), "vms": ()}
        begun: dict[str, Any] = {"status": "started", "hosts": (), "vms": ()}
        story.waves = {
            0: wave_state(wave=0, domains={"web": 0}, ended_at=when(T0 - 7200), **done),
            1: wave_state(wave=1, domains={"web": 1}, started_at=when(T0 - 7200), **begun),
        }
        story.rollout(0)
        assert story.drawn() == []
        assert story.drawn("web/ud/1") == [("started", -KEPT_S, None)]

    def test_a_rollout_that_is_removed_while_it_is_open_ends(self, story: Story) -> None:
        story.wave(1, "started")
        story.clear("caesura/v1/fleet/rollout/r1", 2)
        assert story.drawn() == [("started", 1, 2)]
        story.expire(KEPT_S + 3)
        assert story.snapshot().lanes == ()

    def test_an_earlier_wave_does_not_speak_for_a_later_one(self, story: Story) -> None:
        story.wave(1, "started", 1, domains={"web": 0})
        story.wave(2, "completed", 0, domains={"web": 0})
        assert story.drawn() == [("started", 1, None)]


class TestTime:
    """Clocks that jump."""

    def test_the_last_will_of_a_coordinator_counts_though_it_knows_no_epoch(self) -> None:
        story = Story()
        story.hear(m.CoordinatorPresence(coordinator="c-1f3a", epoch=2, online=True), 0)
        story.hear(m.CoordinatorPresence(coordinator="c", epoch=0, online=False), 1)
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert fleet.coordinator == "offline"
        story.hear(m.CoordinatorPresence(coordinator="old", epoch=1, online=True), 2)
        fleet = story.snapshot().fleet
        assert fleet is not None
        assert fleet.coordinator == "offline", "the epoch of the one that died still stands"

    def test_a_time_that_cannot_be_right_is_when_it_was_heard(self, story: Story) -> None:
        story.frozen(10, sent=500)
        story.frozen(11, "db-1", set="db", sent=-2 * KEPT_S)
        story.frozen(12, "x-1", set="x", sent=-30)
        assert story.drawn() == [("frozen", 10, None)]
        assert story.drawn("db/ud/0") == [("frozen", 11, None)]
        assert story.drawn("x/ud/0") == [("frozen", -30, None)]

    def test_a_clock_that_is_put_back_takes_the_picture_along(self, story: Story) -> None:
        story.frozen(100)
        story.resumed(102, 2.0)
        story.frozen(104)
        before = story.live.revision
        story.step(104, -100)
        assert story.drawn()[0] == ("frozen", 0, 2)
        assert [round(each.since or 0) for each in story.snapshot().paused or ()] == [T0 + 4]
        assert story.live.since(before, T0 + 4).whole
        story.resumed(6, 2.0)
        starts = [start for _, start, _ in story.drawn()]
        assert starts == sorted(starts)

    def test_a_resume_by_a_clock_that_is_behind_does_not_end_before_it_began(self, story: Story) -> None:
        story.frozen(10)
        message = m.VmResumed(
            vm="web-1",
            host="h1",
            set="web",
            update_domain=0,
            operation="op1",
            method="freeze",
            pause_s=1,
            budget_s=5,
            within_budget=True,
            resumed_by="updater",
            at=when(T0 + 5),
        )
        story.hear(message, 11)
        assert story.drawn()[0] == ("frozen", 10, 10)

    @pytest.mark.parametrize("by", [-95.0, 60.0])
    def test_a_clock_that_jumps_makes_nothing_last_longer_or_lie_ahead(self, story: Story, by: float) -> None:
        story.inventory(90)
        story.live.connection("refused", *story.clocks(91))
        story.hear(m.HostPresence(host="h1", online=False, instance="i"), 92)
        for number, domain in enumerate((0, 1)):
            story.frozen(93, f"web-{number}", domain)
        story.resumed(94, 1.0, "web-0")
        story.step(100, by)
        change = story.snapshot(100 + by)
        assert change.fleet is not None
        assert change.fleet.broker_since == T0 + 91 + by
        assert change.fleet.offline_since == {"h1": T0 + 92 + by}
        assert [(alarm.at - T0 - by, (alarm.until or 0) - T0 - by) for alarm in change.fleet.alarms] == [
            (93, 94)
        ]
        assert [each.since for each in change.paused or ()] == [T0 + 93 + by]
        assert [line.at - T0 - by for line in change.log] == [92, 93, 93, 94]
        assert story.drawn()[0] == ("frozen", 93 + by, 94 + by)
        pauses = story.lane().pauses
        assert pauses is not None
        assert pauses.count == 1

    def test_a_clock_that_is_pulled_slowly_moves_nothing(self, story: Story) -> None:
        story.frozen(1)
        for _ in range(5):
            story.step(2, 0.5)
        (paused,) = story.snapshot().paused or ()
        assert paused.since == T0 + 1


class TestBounds:
    """Memory does not grow with what is heard."""

    def test_everything_is_bounded(self, story: Story) -> None:
        for number in range(2 * LOG_KEPT):
            story.frozen(number, operation=f"op{number}")
            story.resumed(number + 0.5, 0.5, operation=f"op{number}")
        story.wave(500, "started")
        lane = story.lane()
        assert SEGMENTS_KEPT - 2 <= len(lane.segments) <= SEGMENTS_KEPT
        assert len(lane.marks) == MARKS_SENT
        assert len(story.live._lanes.at("web", "update_domain", 0).marks) == MARKS_KEPT  # type: ignore[union-attr]
        assert len(story.snapshot().log) == LOG_KEPT
        story.rollout(501, "aborted")
        lane = story.lane()
        assert (len(lane.segments), len(lane.marks)) == (SEGMENTS_IDLE, MARKS_IDLE), (
            "of what is idle less is sent"
        )

    def test_a_long_wave_does_not_push_what_went_wrong_out_of_the_log(self, story: Story) -> None:
        story.resumed(1, 9.0, "web-0", within_budget=False)
        for number in range(2 * LOG_KEPT):
            story.resumed(2 + number, 1.0, f"web-{number}")
        assert [line.vm for line in story.snapshot().log if line.level == "bad"] == ["web-0"]
        for number in range(2 * WRONG_KEPT):
            story.resumed(300 + number, 9.0, f"web-{number}", within_budget=False)
        assert len(story.snapshot().log) == LOG_KEPT + WRONG_KEPT
        at = [line.at for line in story.snapshot().log]
        assert at == sorted(at)

    def test_no_more_lanes_than_a_limit_and_it_says_so(self, story: Story) -> None:
        for number in range(LANES_KEPT // 20 + 1):
            for domain in range(20):
                story.frozen(1, f"v{number}-{domain}", domain, set=f"s{number}")
        change = story.snapshot()
        assert len(change.lanes) == LANES_KEPT
        assert change.fleet is not None
        assert change.fleet.full
        assert change.fleet.paused > LANES_KEPT
        assert len(change.paused or ()) == PAUSED_SENT

    def test_old_stretches_are_forgotten(self, story: Story) -> None:
        story.inventory(0)
        story.frozen(1)
        story.resumed(2, 1.0)
        story.expire(3 + KEPT_S)
        assert story.drawn() == []
        assert story.lane().pauses is None

    def test_only_the_newest_ended_rollouts_are_kept(self, story: Story) -> None:
        for number in range(ROLLOUTS_KEPT * 2):
            story.rollout(number, "completed", rollout=f"r{number}", created_at=when(T0 + number))
        assert len(story.live._rollouts) == ROLLOUTS_KEPT
        (shown,) = story.snapshot().rollouts or ()
        assert shown.rollout == f"r{ROLLOUTS_KEPT * 2 - 1}"


class Reader:
    """What a page does with changes."""

    def __init__(self) -> None:
        self.revision = 0
        self.seen: dict[str, Any] = {}
        self.parts = 0  # changes that were not whole

    def apply(self, change: Delta) -> None:
        told = msgspec.to_builtins(change)
        self.parts += not told["whole"]
        if told["whole"]:
            self.seen = {"lanes": {}, "log": []}
        for part in ("fleet", "rollouts", "paused"):
            if told.get(part) is not None:
                self.seen[part] = told[part]
        self.seen["lanes"] |= {lane["lane"]: lane for lane in told.get("lanes", ())}
        self.seen["log"] = _last([*self.seen["log"], *told.get("log", ())])
        self.revision = told["revision"]


def _last(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    room = {False: LOG_KEPT, True: WRONG_KEPT}
    for line in reversed(lines):
        wrong = line.get("level") in {"warning", "bad"}
        room[wrong] -= 1
        if room[wrong] >= 0:
            kept.insert(0, line)
    return kept


@st.composite
def steps(draw: st.DrawFn, *, jumps: bool) -> list[tuple[Any, ...]]:
    vm = st.sampled_from([("web-1", 0), ("web-2", 1), ("web-3", 1)])
    one = st.one_of(
        st.tuples(st.just("frozen"), vm),
        st.tuples(st.just("resumed"), vm, st.floats(0, 8)),
        st.tuples(
            st.just("wave"), st.integers(0, 1), st.sampled_from([*OPEN, "completed", "failed", "cancelled"])
        ),
        st.tuples(
            st.just("inventory"), st.sampled_from(["running", "paused"]), st.sampled_from(["h1", "h2"])
        ),
        st.tuples(st.just("rollout"), st.sampled_from(["running", "halted", "completed", "aborted"])),
        st.tuples(st.just("forget"), st.sampled_from(["h1", "h2"])),
        st.tuples(st.just("expire")),
        st.tuples(st.just("read")),
    )
    if jumps:
        one = st.one_of(one, st.tuples(st.just("step"), st.sampled_from([-60.0, 60.0])))
    passing = st.sampled_from([0.01, 0.5, 3.0, 2000.0] if jumps else [0.01, 0.5, 3.0])
    return draw(st.lists(st.tuples(passing, one), max_size=40))


@settings(max_examples=120, deadline=None)
@given(steps(jumps=True))
def test_whatever_happens_lanes_are_in_order_and_changes_add_up(plan: list[tuple[Any, ...]]) -> None:
    _hold(plan)


@settings(max_examples=120, deadline=None)
@given(steps(jumps=False))
def test_without_jumps_of_the_clock_changes_add_up_piece_by_piece(plan: list[tuple[Any, ...]]) -> None:
    reader = _hold([*plan, (0.5, ("read",)), *plan])
    assert reader.parts or any(step[0] == "expire" for _, step in plan)


def _hold(plan: list[tuple[Any, ...]]) -> Reader:
    story, reader, at = Story(), Reader(), 0.0
    for number, (pass_s, step) in enumerate(plan):
        at += pass_s
        match step:
            case ("frozen", (vm, domain)):
                story.frozen(at, vm, domain, operation=f"op{number}")
            case ("resumed", (vm, domain), pause_s):
                story.resumed(at, pause_s, vm, domain, operation=f"op{number}")
            case ("wave", index, status):
                story.wave(at, status, index)
            case ("inventory", state, host):
                story.inventory(at, host, state)
            case ("rollout", status):
                story.rollout(at, status)
            case ("forget", host):
                story.live.forget_host(host)
            case ("expire",):
                story.expire(at)
            case _:
                reader.apply(story.live.since(reader.revision, T0 + at))
        for lane in story.snapshot().lanes:
            times = [edge for each in lane.segments for edge in (each.start, each.end) if edge is not None]
            assert times == sorted(times), lane
            assert all(each.end is not None for each in lane.segments[:-1])
            assert (lane.state == "frozen") == bool(lane.standing)
        standing = {(each.set, each.domain) for each in story.snapshot().paused or ()}
        frozen = {(lane.set, lane.domain) for lane in story.snapshot().lanes if lane.state == "frozen"}
        assert frozen == standing
    reader.apply(story.live.since(reader.revision, T0 + at))
    anew = Reader()
    anew.apply(story.live.snapshot(T0 + at))
    assert reader.seen == anew.seen
    return reader


@pytest.mark.parametrize(
    ("message", "what", "level"),
    [
        (m.VmReady(vm="web-1", event_id="e", ready=False, reason="busy"), "not ready", "bad"),
        (
            m.HookFinished(vm="web-1", hook="prepare", outcome="timeout", seconds=9),
            "prepare hook took too long",
            "bad",
        ),
        (m.RequestAnswered(request="q", accepted=False, reason="held"), "request refused", "warning"),
        (m.EventApproved(event_id="e", set="web", vm="web-1", at=when(T0)), "approved", "good"),
        (
            m.OperationReported(
                operation="o", host="h1", epoch=1, status="refused", reason="old epoch", at=when(T0)
            ),
            "operation refused",
            "bad",
        ),
        (
            m.AbortOperation(operation="o", epoch=1, coordinator="c", host="h1", reason="asked"),
            "abort commanded",
            "warning",
        ),
        (
            m.EventChanged(
                event_id="e",
                set="web",
                event_type="Freeze",
                status="failed",
                resources=("web-1",),
                incarnation=1,
                not_before=when(T0),
                at=when(T0) + timedelta(seconds=1),
            ),
            "event failed",
            "bad",
        ),
    ],
)
def test_the_log_says_it_in_words(message: Message, what: str, level: str) -> None:
    line = log_entry(message, T0)
    assert line is not None
    assert (line.what, line.level) == (what, level)


@pytest.mark.parametrize(
    "message",
    [
        m.VmReady(vm="web-1", event_id="e", ready=True),
        m.HookFinished(vm="web-1", hook="recover", outcome="succeeded"),
        m.RequestAnswered(request="q", accepted=True),
        m.CoordinatorPresence(coordinator="c", epoch=1, online=True),
        cast(
            "Message", m.OperationReported(operation="o", host="h1", epoch=1, status="accepted", at=when(T0))
        ),
    ],
)
def test_what_goes_well_and_often_is_not_in_the_log(message: Message) -> None:
    assert log_entry(message, T0) is None


def test_a_long_list_of_sets_is_cut() -> None:
    domains = {f"s{number}": number for number in range(9)}
    line = log_entry(m.WaveChanged(rollout="r", wave=1, status="started", domains=domains, at=when(T0)), T0)
    assert line is not None
    assert line.detail == "s0 0, s1 1, s2 2, s3 3, s4 4, s5 5 and 3 more"


def test_a_vm_in_no_set_is_named_without_its_set_and_domain() -> None:
    domains = {"_solo": 0, "web": 2}
    line = log_entry(m.WaveChanged(rollout="r", wave=0, status="started", domains=domains, at=when(T0)), T0)
    assert line is not None
    assert line.detail == "solo, web 2"
