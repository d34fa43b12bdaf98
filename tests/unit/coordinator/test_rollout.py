"""The rollout machine, case by case: notice, approvals, gates, verification, halt, resume, abort."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.fitting import fits
from caesura.contract.reasons import Reason
from caesura.fleet.retained_messages import Cleared
from caesura.lifecycle.errors import IllegalStatusChange
from caesura.lifecycle.proof import memory_proof
from caesura_coordinator.announcements import DESCRIPTIONS, KERNEL_DESCRIPTION, scheduled_event
from caesura_coordinator.authority import Authority
from caesura_coordinator.commands import command_for, due_operations
from caesura_coordinator.effects import Effect, EventEnded, EventScheduled, EventStarted
from caesura_coordinator.fleet_lookup import FleetLookup
from caesura_coordinator.inputs import Abort, Approve, DocumentSuperseded, Input, Resume, Tick
from caesura_coordinator.plan import make_plan
from caesura_coordinator.published_state import wave_state
from caesura_coordinator.records import HostOperation, Rollout, Wave, new_rollout
from caesura_coordinator.request_refusals import RequestRefused
from caesura_coordinator.rollout import after_restart, decide
from caesura_coordinator.verification import verify
from caesura_testing.refold import refold

T0 = datetime(2026, 4, 20, 12, 0, 0, tzinfo=UTC)


class Story:
    """Two hosts in two domains of one set, and a rollout over them."""

    def __init__(self, fleet: FleetLookup, authority: Authority, **policy: object) -> None:
        values: dict[str, object] = {"notice_s": 60.0, "verify_timeout_s": 20.0, **policy}
        self.policy = m.Policy(**values)  # type: ignore[arg-type]
        self.fleet = fleet
        self.authority = authority
        self.now = T0
        self.effects: list[Effect] = []
        plan = make_plan(fleet.snapshot(), update="patch", selection=m.Selection(), policy=self.policy)
        assert not plan.refusals
        self.rollout: Rollout = new_rollout(
            "r", plan, policy=self.policy, fence_hosts=("h1", "h2"), requested_by="ops", now=T0
        )

    def wave_is(self, status: str) -> bool:
        return self.wave.status == status

    def is_(self, status: str) -> bool:
        return self.rollout.status == status

    def give(self, received: Input, after_s: float = 0.0) -> Story:
        self.now += timedelta(seconds=after_s)
        self.rollout, effects = decide(self.rollout, received, self.fleet, self.authority, self.now)
        self.effects += effects
        return self

    @property
    def wave(self) -> Wave:
        wave = self.rollout.current
        assert wave is not None
        return wave

    def announce(self) -> Story:
        return self.give(Tick())

    def ready(self, *, ready: bool = True, reason: str = "") -> Story:
        for event in self.wave.events:
            for vm in event.resources:
                self.give(m.VmReady(vm=vm, event_id=event.event_id, ready=ready, reason=reason))
        return self

    def approve(self, by: str = "") -> Story:
        for event in self.wave.events:
            self.give(Approve(event_id=event.event_id.lower(), by=by or event.resources[0]))
        return self

    def started(self) -> Story:
        return self.announce().ready().approve().give(Tick())

    def report(self, status: m.OperationStatus = "completed", reason: str = "", **result: Any) -> Story:
        for operation in self.wave.operations:
            vms = tuple(
                m.VmResult(
                    **{
                        "vm": vm.vm,
                        "set": vm.set,
                        "update_domain": vm.update_domain,
                        "state": "running",
                        "frozen": True,
                        "pause_s": 2.0,
                        "resumed_by": "updater",
                        **result,
                    }
                )
                for vm in self.wave.vms
                if vm.host == operation.host
            )
            self.give(
                m.OperationReported(
                    operation=operation.operation,
                    host=operation.host,
                    epoch=1,
                    status=status,
                    reason=reason,
                    vms=vms,
                    at=self.now,
                )
            )
        return self

    def clocks(self, *, synced: bool = True, error_after_s: float = 0.001, memory: bool = True) -> Story:
        operations = {each.host: each.operation for each in self.wave.operations}
        for vm in self.wave.vms:
            self.give(
                m.VmClockSynced(
                    vm=vm.vm,
                    host=vm.host,
                    set=vm.set,
                    update_domain=vm.update_domain,
                    operation=operations[vm.host],
                    synced=synced,
                    by="agent" if synced else "nobody",
                    error_after_s=error_after_s,
                    memory=m.MemoryProof(proof="heartbeat", ok=memory),
                    reason="" if synced else "no answer",
                    at=self.now,
                )
            )
        return self

    def ends(self) -> list[str]:
        return [each.event.status for each in self.effects if isinstance(each, EventEnded)]

    def commands(self) -> list[str]:
        return [type(each).__name__ for each in self.due_commands()]

    def due_commands(self) -> list[m.StartOperation | m.AbortOperation]:
        due = due_operations(self.rollout, self.authority)
        return [command_for(self.rollout, each, self.authority) for each in due]


@pytest.fixture
def two_hosts(
    build: Callable[..., m.VmRecord], host: Callable[..., m.HostInventory], fleet: Callable[..., FleetLookup]
) -> FleetLookup:
    return fleet(host("h1", build("w1")), host("h2", build("w2", domain=1)))


@pytest.fixture
def story(two_hosts: FleetLookup, authority: Authority) -> Story:
    return Story(two_hosts, authority)


_AGENT_GONE = m.AgentPresence(vm="w1", online=False, boot_id="b")


def _told(fleet: FleetLookup, *messages: Message | Cleared) -> FleetLookup:
    """The fleet told this, too."""
    return FleetLookup(refold(fleet.state, *messages))


def _gone(host: str) -> tuple[Cleared, Cleared]:
    return Cleared(m.HostInventory, {"host": host}), Cleared(m.HostPresence, {"host": host})


def _with_vm(fleet: FleetLookup, host: str, **changes: object) -> FleetLookup:
    inventory = fleet.inventories[host]
    vms = tuple(msgspec.structs.replace(vm, **changes) for vm in inventory.vms)
    return _told(fleet, msgspec.structs.replace(inventory, vms=vms))


def test_a_whole_rollout_goes_domain_by_domain(story: Story) -> None:
    story.started()
    assert story.commands() == ["StartOperation"]
    story.report().clocks()
    assert [wave.status for wave in story.rollout.waves] == ["completed", "scheduled"]
    story.ready().approve().give(Tick()).report().clocks()
    assert story.is_("completed")
    assert story.ends() == ["completed", "completed"]
    assert story.commands() == []


def test_not_before_is_a_whole_second_and_never_earlier_than_the_notice(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    story = Story(two_hosts, authority)
    story.now += timedelta(milliseconds=300)
    story.announce()
    assert story.wave.not_before == T0 + timedelta(seconds=61)


@pytest.mark.parametrize("source", ["Platform", "User"])
def test_events_are_of_the_platform_unless_the_operator_says_otherwise(
    two_hosts: FleetLookup, authority: Authority, source: str
) -> None:
    story = Story(
        two_hosts, authority, **({} if source == "Platform" else {"event_source": source})
    ).announce()
    assert scheduled_event(story.rollout, story.wave.events[0]).source == source
    on_demand = msgspec.structs.replace(story.rollout, hold_s=9.0)
    assert scheduled_event(on_demand, story.wave.events[0]).source == source, "a freeze on demand, too"


def test_an_event_says_that_its_hosts_kernel_is_replaced(story: Story) -> None:
    story.announce()
    event = story.wave.events[0]
    assert scheduled_event(story.rollout, event).description == DESCRIPTIONS["Freeze"]
    wave = msgspec.structs.replace(
        story.wave, vms=tuple(msgspec.structs.replace(vm, method="kexec") for vm in story.wave.vms)
    )
    over = msgspec.structs.replace(story.rollout, waves=(wave, *story.rollout.waves[1:]))
    assert scheduled_event(over, event).description == KERNEL_DESCRIPTION
    assert "restart" in KERNEL_DESCRIPTION


def test_without_approval_the_wave_waits_for_not_before(story: Story) -> None:
    story.announce().ready().give(Tick(), 59.9)
    assert story.wave_is("scheduled")
    assert story.commands() == []
    story.give(Tick(), 0.1)
    assert story.wave_is("started")
    assert [type(each) for each in story.effects if isinstance(each, EventStarted | EventScheduled)] == [
        EventScheduled,
        EventStarted,
    ]


def test_an_approval_shortens_the_notice_but_not_the_agents_answer(story: Story) -> None:
    story.announce().approve().give(Tick(), 1)
    assert story.wave_is("scheduled")
    story.ready()
    assert story.wave_is("started")


@pytest.mark.parametrize("answers", ["none", "one of two"])
def test_policy_may_proceed_without_readiness_at_not_before_but_an_approval_does_not_replace_the_answer(
    answers: str,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    """Approved early, the prepare hooks still have the notice: a silent agent may be in the middle of its hook."""
    both = fleet(host("h1", build("w1"), build("w3")), host("h2", build("w2", domain=1)))
    story = Story(both, authority, on_not_ready="proceed").announce()
    if answers == "one of two":
        story.give(m.VmReady(vm="w1", event_id=story.wave.events[0].event_id, ready=True))
    story.approve().give(Tick(), 59.9)
    assert story.wave_is("scheduled")
    assert story.commands() == []
    story.give(Tick(), 0.1)
    assert story.wave_is("started")


def test_an_agent_that_is_not_ready_halts_before_any_pause(story: Story) -> None:
    story.announce().ready(ready=False, reason="prepare hook exited with 3").approve()
    assert story.is_("halted")
    assert "exited with 3" in story.rollout.reason
    assert story.ends() == ["cancelled"]
    assert story.commands() == []


def test_an_agent_that_never_answers_halts_at_not_before(story: Story) -> None:
    story.announce().approve().give(Tick(), 60)
    assert (story.rollout.status, story.ends()) == ("halted", ["cancelled"])
    assert "w1" in story.rollout.reason


def test_policy_may_go_on_without_readiness(two_hosts: FleetLookup, authority: Authority) -> None:
    story = Story(two_hosts, authority, on_not_ready="proceed")
    story.announce().ready(ready=False).give(Tick(), 60)
    assert story.wave_is("started")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 0}, "not acknowledged epoch 1"),
        ({"coordinator": "other"}, "not acknowledged epoch 1"),
        ({"operation": "x"}, "busy with operation x"),
        ({"guard": "absent"}, "no pause guard"),
    ],
)
def test_any_host_of_the_set_can_block_the_start_though_it_is_not_in_the_wave(
    change: dict[str, object], words: str, story: Story
) -> None:
    story.announce().ready()
    blocked = msgspec.structs.replace(story.fleet.inventories["h2"], **change)
    story.fleet = _told(story.fleet, blocked)
    story.approve().give(Tick())
    assert story.wave_is("scheduled")
    assert words in story.wave.waiting_for
    story.give(Tick(), 20)
    assert story.is_("halted")
    assert words in story.rollout.reason
    assert story.ends() == ["cancelled"]


@pytest.mark.parametrize("stage", ["pending", "scheduled"])
@pytest.mark.parametrize("gone", ["h1", "h2"])
def test_a_host_of_the_set_whose_inventory_has_vanished_blocks_the_start(
    gone: str, stage: str, story: Story
) -> None:
    """Its VMs may be paused by a command of another coordinator: who cannot be asked is never assumed idle (I1)."""
    whole = story.fleet
    if stage == "scheduled":
        story.announce().ready()
    story.fleet = _told(whole, *_gone(gone))
    story.give(Tick(), 60)
    assert story.wave_is(stage)
    assert story.commands() == []
    assert gone in story.wave.waiting_for
    story.fleet = whole
    story.give(Tick())
    assert story.wave_is("scheduled" if stage == "pending" else "started")


def test_a_host_outside_the_wave_whose_inventory_has_vanished_is_named_and_halts_in_the_end(
    story: Story,
) -> None:
    story.announce().ready()
    story.fleet = _told(story.fleet, *_gone("h2"))
    story.approve()
    assert story.wave.waiting_for == "h2 has not reported an inventory"
    story.give(Tick(), 20)
    assert (story.rollout.status, story.ends()) == ("halted", ["cancelled"])
    assert "h2 has not reported an inventory" in story.rollout.reason


@pytest.mark.parametrize("stage", ["pending", "scheduled"])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("fault_domain", {"fault_domain": 1}),
        ("update_domain", {"update_domain": 1}),
        ("update_domain", {"set": "db"}),
    ],
)
def test_vms_that_are_in_another_domain_than_the_plan_has_them_in_do_not_pause(
    key: str,
    change: dict[str, object],
    stage: str,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    """Else the wave pauses two domains of a set at once (I1). The host knows of the update domain only."""
    both = fleet(host("h1", build("w1")), host("h2", build("w2")))
    story = Story(both, authority, domain_key=key)
    assert len(story.rollout.waves) == 1
    if stage == "scheduled":
        story.announce().ready()
    story.fleet = _with_vm(both, "h2", **change)
    story.announce().ready().approve(by="w1").give(Tick())
    assert story.commands() == []
    assert "the plan has it in" in story.wave.waiting_for
    story.give(Tick(), 60).give(Tick(), 20)
    assert story.is_("halted")
    assert "plan again" in story.rollout.reason


@pytest.mark.parametrize("found", ["paused", "unknown"])
def test_a_vm_elsewhere_in_the_set_that_may_be_paused_blocks(found: m.VmState, story: Story) -> None:
    """A host that cannot tell is not assumed to have nothing paused (I1)."""
    story.announce().ready()
    story.fleet = _with_vm(story.fleet, "h2", state=found)
    story.approve().give(Tick(), 1)
    assert story.wave_is("scheduled")
    assert f"w2 on h2 is {found}" in story.wave.waiting_for


def test_a_paused_vm_elsewhere_in_the_set_blocks_until_it_runs(story: Story) -> None:
    whole = story.fleet
    story.announce().ready()
    story.fleet = _with_vm(whole, "h2", state="paused")
    story.approve().give(Tick(), 1)
    assert story.wave_is("scheduled")
    assert "w2 on h2 is paused" in story.wave.waiting_for
    story.fleet = whole
    story.give(Tick(), 1)
    assert story.wave_is("started")


def test_a_failed_operation_halts_and_the_event_ends_failed(story: Story) -> None:
    story.started().report("failed", "update exited with 1")
    assert (story.rollout.status, story.ends()) == ("halted", ["failed"])
    assert story.rollout.reason == "h1 failed: update exited with 1"
    assert story.rollout.waves[1].status == "pending"


def test_what_a_failed_update_wrote_last_is_published_with_its_wave(story: Story) -> None:
    story.started()
    (operation,) = story.wave.operations
    told = m.UpdateOutcome(
        update="patch", outcome="failed", exit_code=3, output_tail="x" * 5000 + "no space\x1b[2J"
    )
    story.give(
        m.OperationReported(
            operation=operation.operation, host="h1", epoch=1, status="failed", update=told, at=story.now
        )
    )
    (failed,) = wave_state("r", story.rollout.waves[0]).failed_updates
    assert (failed.host, failed.outcome, failed.exit_code) == ("h1", "failed", 3)
    assert len(failed.output_tail) == 2048
    assert failed.output_tail.endswith("xno space\x1b[2J"), "as the update wrote it"
    succeeded = msgspec.structs.replace(told, outcome="succeeded")
    again = msgspec.structs.replace(operation, update=succeeded)
    wave = msgspec.structs.replace(story.rollout.waves[0], operations=(again,))
    assert not wave_state("r", wave).failed_updates


def test_outputs_give_way_before_a_waves_state_becomes_too_large(story: Story) -> None:
    told = m.UpdateOutcome(update="patch", outcome="failed", exit_code=1, output_tail="\0" * 4096)
    operations = tuple(
        HostOperation(host=f"h{n}", operation=f"o{n}", status="failed", update=told) for n in range(40)
    )
    few = msgspec.structs.replace(story.rollout.waves[0], operations=operations)
    shown = wave_state("r", few)
    assert fits(shown)
    assert [len(each.output_tail) for each in shown.failed_updates] == [2048] * 3 + [0] * 13
    vms = tuple(msgspec.structs.replace(few.vms[0], vm=f"vm-{n:060d}") for n in range(3600))
    cut = wave_state("r", msgspec.structs.replace(few, vms=vms))
    assert fits(cut)
    assert [each.host for each in cut.failed_updates] == [f"h{n}" for n in range(16)]
    assert not any(each.output_tail for each in cut.failed_updates)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"state": "paused"}, "w1 is paused after the resume"),
        ({"pause_s": 31.0}, "w1 was paused 31.000 s"),
        ({"memory": m.MemoryProof(proof="digest", ok=False, detail="a != b")}, "changed in memory"),
    ],
)
def test_bad_health_after_the_pause_halts(result: dict[str, Any], words: str, story: Story) -> None:
    story.started().report(**result).clocks()
    assert story.is_("halted")
    assert words in story.rollout.reason


def test_an_unsynced_clock_halts_or_not_by_policy(two_hosts: FleetLookup, authority: Authority) -> None:
    strict = Story(two_hosts, authority).started().report().clocks(synced=False)
    assert "unsynced: no answer" in strict.rollout.reason
    lax = Story(two_hosts, authority, on_unsynced="proceed").started().report().clocks(synced=False)
    assert lax.rollout.waves[0].status == "completed"


def test_a_clock_outside_its_bound_halts(story: Story) -> None:
    story.started().report().clocks(error_after_s=-0.2)
    assert "-0.200 s off" in story.rollout.reason


def test_another_guest_after_the_pause_halts(story: Story) -> None:
    story.started().report().clocks(memory=False)
    assert "not the guest it was" in story.rollout.reason


# -- proof of memory (I3) -----------------------------------------------------------------------------------

SHOWN_BY_HOST = memory_proof(["digest_equal"])
NOTHING = memory_proof(detail="no time was left in the budget for the second digest")


def test_memory_of_which_nothing_was_shown_halts_when_the_policy_asks(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    """A wave with proof `none`, or none at all, was verified."""
    for memory in (NOTHING, None):
        strict = Story(two_hosts, authority, on_unproven="halt").started().report(memory=memory).clocks()
        assert strict.is_("halted")
        assert strict.rollout.reason.startswith(
            "w1 is unproven: not rebooted of its memory, planned was digest equal, sampled digest equal, not rebooted"
        )
    assert (
        "no time was left"
        in Story(two_hosts, authority, on_unproven="halt")
        .started()
        .report(memory=NOTHING)
        .clocks()
        .rollout.reason
    )
    for policy in ("proceed", None):  # None: a freeze, whose process keeps the memory
        lax = Story(two_hosts, authority, on_unproven=policy).started().report(memory=NOTHING).clocks()
        assert lax.rollout.waves[0].status == "completed"


@pytest.mark.parametrize(
    ("by_host", "by_guest"),
    [
        (SHOWN_BY_HOST, memory_proof(["not_rebooted"])),
        (memory_proof(["sampled_digest_equal"]), None),
        (None, memory_proof(["canary_equal", "not_rebooted"])),
        (m.MemoryProof(proof="digest", ok=True), None),
    ],
)
def test_one_proof_of_memory_from_either_side_is_enough(
    by_host: m.MemoryProof | None,
    by_guest: m.MemoryProof | None,
    two_hosts: FleetLookup,
    authority: Authority,
) -> None:
    story = Story(two_hosts, authority, on_unproven="halt").started().report(memory=by_host)
    story.give(_verdict(story, "w1", "h1", memory=by_guest))
    assert story.rollout.waves[0].status == "completed"


@pytest.mark.parametrize("policy", ["halt", "proceed", None])
def test_a_canary_that_differs_halts_whatever_the_policy(
    policy: str | None, two_hosts: FleetLookup, authority: Authority
) -> None:
    story = Story(two_hosts, authority, on_unproven=policy).started().report(memory=SHOWN_BY_HOST)
    wrong = memory_proof(["not_rebooted"], ["canary_equal"], "canary differs: 2 of 1024 pages")
    story.give(_verdict(story, "w1", "h1", memory=wrong))
    assert story.is_("halted")
    assert "(canary differs): canary differs: 2 of 1024 pages" in story.rollout.reason


def test_an_operator_who_resumes_accepts_what_is_unproven_and_nobody_is_paused_again(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    story = Story(two_hosts, authority, on_unproven="halt").started().report(memory=NOTHING).clocks()
    story.give(Resume())
    assert story.rollout.waves[0].status == "completed"


def test_a_verdict_that_never_comes_leaves_the_vm_unproven_too(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    """Who accepts that no verdict came must have been shown that no proof did."""
    story = Story(two_hosts, authority, on_unproven="halt").started().report(memory=NOTHING).give(Tick(), 20)
    assert "no verdict on its clock" in story.rollout.reason
    assert "w1 is unproven: nothing shown" in story.rollout.reason


def test_a_swap_is_asked_for_a_proof_unless_the_policy_says_otherwise(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    beside = m.UpdateRecord(
        update="patch", impact="pause", scope="vm", expected_s=2, timeout_s=9, vmm="beside"
    )
    able = fleet(host("h1", build("w1", methods=("live", "swap")), updates=(beside,)), host("h2", updates=()))
    nothing = memory_proof(detail="reading the memory of process 7 is not permitted")
    story = Story(able, authority).started().report(memory=nothing).clocks()
    assert story.is_("halted")
    assert "w1 is unproven" in story.rollout.reason
    assert "is not permitted" in story.rollout.reason
    shown = Story(able, authority).started().report(memory=memory_proof(["sampled_digest_equal"])).clocks()
    assert shown.is_("completed")


def test_a_wave_stored_by_an_older_coordinator_is_read_as_it_was_meant(story: Story) -> None:
    story.started().report().clocks(memory=False)
    wave = story.rollout.waves[0]
    stored = msgspec.structs.replace(wave.clocks["w1"], held=(), broken=(), memory_detail="")
    old = msgspec.structs.replace(wave, clocks={"w1": stored})
    (wrong,) = verify(old, story.policy)[0]
    assert wrong == Reason("memory_changed", "w1 is not the guest it was before the pause (rebooted)")


def test_a_missing_clock_verdict_is_asked_for_again_and_halts_in_the_end(story: Story) -> None:
    story.started().report()
    assert story.wave_is("verifying")
    assert story.commands() == ["StartOperation"]
    story.give(Tick(), 20)
    assert "no verdict on its clock" in story.rollout.reason


@pytest.mark.parametrize("on_not_ready", ["halt", "proceed"])
def test_an_answer_that_nobody_asked_for_stands_in_for_none_that_is_missing(
    on_not_ready: str,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    """As many answers as there are agents are not the answers of all agents."""
    without = build("w2", agent=False)
    hosts = fleet(host("h1", build("w1"), without), host("h2", build("w3", domain=1)))
    story = Story(hosts, authority, on_not_ready=on_not_ready)
    story.announce().approve()
    event = story.wave.events[0].event_id
    story.give(m.VmReady(vm="w2", event_id=event, ready=True))
    assert story.wave.readiness.keys() == {"w2"}
    assert story.wave_is("scheduled")
    story.give(m.VmReady(vm="w1", event_id=event, ready=True))
    assert story.wave_is("started")


def test_a_verdict_that_nobody_waits_for_stands_in_for_none_that_is_missing(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    without = build("w2", agent=False)
    story = Story(fleet(host("h1", build("w1"), without), host("h2", build("w3", domain=1))), authority)
    story.started().report()
    operation = story.wave.operations[0].operation

    def verdict(vm: str) -> m.VmClockSynced:
        return m.VmClockSynced(
            vm=vm, host="h1", set="web", update_domain=0, operation=operation, synced=True, by="agent", at=T0
        )

    story.give(verdict("w2"))
    assert story.wave.clocks.keys() == {"w2"}
    assert story.wave_is("verifying")
    story.give(verdict("w1"))
    assert story.rollout.waves[0].status == "completed"


def test_a_silent_agent_after_the_resume_halts(story: Story) -> None:
    story.started().report()
    story.fleet = _told(story.fleet, _AGENT_GONE)
    story.clocks().give(Tick(), 20)
    assert "its agent is offline" in story.rollout.reason


def test_soak_holds_the_next_wave_back_and_ill_health_in_it_halts(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    story = Story(two_hosts, authority, soak_s=100.0).started().report().clocks().give(Tick(), 99)
    assert [wave.status for wave in story.rollout.waves] == ["soaking", "pending"]
    assert story.ends() == ["completed"]
    story.fleet = _with_vm(story.fleet, "h1", state="stopped")
    story.give(Tick(), 0.5).give(Tick(), 20)
    assert story.is_("halted")
    assert story.ends() == ["completed"]  # an event that ended does not end again


def test_a_host_that_never_reports_is_lost_and_told_to_forget(story: Story) -> None:
    story.started().give(Tick(), 90)
    assert story.is_("halted")
    assert "did not report in time" in story.rollout.reason
    assert story.commands() == ["AbortOperation"]
    with pytest.raises(RequestRefused, match="h1"):
        story.give(Resume())
    story.report("cancelled")
    assert story.commands() == []
    story.give(Resume())
    assert story.is_("running")


def test_a_lost_host_that_did_its_part_after_all_is_verified_before_the_next_domain(story: Story) -> None:
    story.started().give(Tick(), 90).report("completed").give(Resume())
    assert (story.rollout.waves[0].status, story.wave.index) == ("verifying", 0), (
        "no verdict on its clock yet"
    )
    story.give(Tick(), 21)
    assert story.is_("halted")
    assert "no verdict on its clock" in story.rollout.reason
    story.give(Resume())  # the operator has seen what the verification found, and accepts it
    assert story.rollout.waves[0].status == "completed"


@pytest.mark.parametrize("late", ["before the resume", "after it"])
def test_a_lost_host_with_changed_memory_halts_the_rollout_again(late: str, story: Story) -> None:
    changed = m.MemoryProof(proof="digest", ok=False, detail="other bytes")
    story.started().give(Tick(), 90)
    story.report("completed", memory=changed)
    verdict = _verdict(story, "w1", "h1")
    if late == "before the resume":
        story.give(verdict).give(Resume())
    else:
        story.give(Resume()).give(verdict)
    assert story.is_("halted")
    assert "changed in memory" in story.rollout.reason
    assert story.wave.index == 0


def test_what_an_operator_accepted_is_not_held_against_the_wave_again(story: Story) -> None:
    story.started().report().clocks(synced=False)
    healthy = story.fleet
    story.fleet = _with_vm(healthy, "h1", state="stopped")
    story.give(Resume()).give(Tick(), 21)
    assert story.is_("halted")
    story.fleet = healthy
    story.give(Resume())
    assert story.rollout.waves[0].status == "completed"


def _verdict(story: Story, vm: str, host: str, **changes: Any) -> m.VmClockSynced:
    operation = next(each.operation for each in story.wave.operations if each.host == host)
    values: dict[str, Any] = {"synced": True, "by": "agent", "at": story.now, **changes}
    return m.VmClockSynced(vm=vm, host=host, set="web", update_domain=0, operation=operation, **values)


@pytest.mark.parametrize("when", ["before the resume", "after it"])
def test_accepting_what_was_found_of_one_vm_accepts_nothing_of_another(when: str, pair: Story) -> None:
    """The first thing wrong halts; what the verification had not come to is looked at after the resume (I3, I8)."""
    pair.started().give(_report_of(pair, "h1", "completed")).give(_report_of(pair, "h2", "completed"))
    other = m.MemoryProof(proof="heartbeat", ok=False, detail="it started anew")
    anew = _verdict(pair, "w2", "h2", memory=other)
    pair.give(_verdict(pair, "w1", "h1", synced=False, reason="no answer"))
    assert pair.is_("halted")
    assert "w1 is unsynced" in pair.rollout.reason
    if when == "before the resume":
        pair.give(anew).give(Resume())
    else:
        pair.give(Resume()).give(anew)
    assert [wave.status for wave in pair.rollout.waves] == ["failed", "pending"]
    assert pair.rollout.reason == ("w2 is not the guest it was before the pause (rebooted): it started anew")
    pair.give(Resume())  # now the operator has seen both
    assert pair.rollout.waves[0].status == "completed"


def test_a_verification_that_was_cut_short_begins_anew(story: Story) -> None:
    """Nothing was found yet when another coordinator's document halted it, so there is nothing to accept (I8)."""
    story.started().report()
    assert story.wave_is("verifying")
    unsynced = _verdict(story, "w1", "h1", synced=False, by="nobody")
    story.give(DocumentSuperseded(set="web", open_events=frozenset()))
    assert story.is_("halted")
    story.give(Resume())
    assert (story.wave.index, story.wave.status) == (0, "verifying")
    story.give(unsynced)
    assert story.is_("halted")
    assert "w1 is unsynced" in story.rollout.reason


def test_a_verdict_that_comes_after_its_absence_was_accepted_is_looked_at(
    two_hosts: FleetLookup, authority: Authority
) -> None:
    """Nobody has seen it: neither when the wave halted for want of it, nor when it halted again while it soaked."""
    story = Story(two_hosts, authority, soak_s=100.0).started().report()
    other = m.MemoryProof(proof="heartbeat", ok=False, detail="it started anew")
    anew = _verdict(story, "w1", "h1", memory=other)
    story.give(Tick(), 20)
    assert "no verdict on its clock" in story.rollout.reason
    story.give(Resume())
    assert story.wave_is("soaking")
    story.fleet = _with_vm(two_hosts, "h1", state="stopped")
    story.give(Tick(), 1).give(Tick(), 20)
    assert story.is_("halted")
    story.fleet = two_hosts
    story.give(anew).give(Resume())
    assert story.is_("halted")
    assert "w1 is not the guest it was" in story.rollout.reason
    story.give(Resume())  # now the operator has seen it; what is left of the soak is cut, as for ill health
    assert story.rollout.waves[0].status == "completed"


def test_resume_tries_the_failed_wave_again_with_new_ids(story: Story) -> None:
    story.started()
    first = (story.wave.events[0].event_id, story.wave.operations[0].operation)
    story.report("failed").give(Resume()).started()
    assert story.wave_is("started")
    assert story.wave.events[0].event_id != first[0]
    assert story.wave.operations[0].operation != first[1]
    story.report().clocks()
    assert story.rollout.waves[0].status == "completed"


def test_resume_does_not_pause_hosts_again_that_did_their_part(story: Story) -> None:
    story.started().report().clocks(synced=False)
    story.give(Resume()).give(Tick())
    assert story.rollout.waves[0].status == "completed"
    assert story.wave.index == 1


def test_abort_while_scheduled_cancels_the_event_and_sends_nothing(story: Story) -> None:
    story.announce().give(Abort(reason="wrong update"))
    assert (story.rollout.status, story.ends(), story.commands()) == ("aborted", ["cancelled"], [])
    assert "wrong update" in story.rollout.reason
    story.give(Tick(), 100)
    assert story.commands() == []


def test_abort_while_started_waits_for_the_hosts_word(story: Story) -> None:
    story.started().give(Abort())
    assert (story.rollout.status, story.commands()) == ("aborting", ["AbortOperation"])
    story.report("cancelled", frozen=False)
    assert (story.rollout.status, story.ends()) == ("aborted", ["cancelled"])


def test_abort_after_a_pause_ends_the_event_failed(story: Story) -> None:
    story.started().give(Abort()).report("failed", "aborted")
    assert (story.rollout.status, story.ends()) == ("aborted", ["failed"])


@pytest.mark.parametrize("stage", ["pending", "verifying", "soaking", "halted"])
def test_abort_works_in_every_other_state(stage: str, two_hosts: FleetLookup, authority: Authority) -> None:
    story = Story(two_hosts, authority, soak_s=5.0)
    if stage == "verifying":
        story.started().report()
    elif stage == "soaking":
        story.started().report().clocks()
    elif stage == "halted":
        story.started().report("failed")
    assert stage in {story.wave.status, story.rollout.status}
    story.give(Abort())
    assert story.is_("aborted")
    assert len(story.ends()) == sum(bool(wave.events) for wave in story.rollout.waves)


def test_an_abort_keeps_why_the_rollout_had_halted(story: Story) -> None:
    story.started().report("failed", "the disk of h1 is full")
    halted = story.rollout.reason
    assert "the disk of h1 is full" in halted
    story.give(Abort(reason="not tonight"))
    assert story.rollout.reason == f"aborted: not tonight; it had halted: {halted}"
    assert "the disk of h1 is full" in story.rollout.waves[0].reason


def test_illegal_requests_name_both_states(story: Story) -> None:
    with pytest.raises(IllegalStatusChange, match="'running' to 'running'"):
        story.give(Resume())
    story.give(Abort())
    with pytest.raises(IllegalStatusChange, match="'aborted' to 'aborted'"):
        story.give(Abort())


def test_late_and_foreign_messages_change_nothing(story: Story) -> None:
    story.started()
    before = story.rollout
    foreign = m.OperationReported(operation="other", host="h1", epoch=1, status="failed", at=story.now)
    story.give(foreign).give(Approve(event_id="nobody's", by="w1"))
    assert story.rollout == before
    story.report()
    done = story.rollout
    story.report("failed")  # a late contradiction
    assert story.rollout == done


def test_a_restart_gives_hosts_time_but_never_moves_what_was_announced(story: Story) -> None:
    story.started()
    later = story.now + timedelta(hours=1)
    again = after_restart(story.rollout, later)
    wave = again.current
    assert wave is not None
    assert wave.report_by == later + timedelta(seconds=30)
    assert wave.not_after == story.wave.not_after
    assert wave.not_before == story.wave.not_before


def test_live_updates_warn_nobody(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    quiet = m.UpdateRecord(update="patch", impact="none", scope="host", expected_s=1, timeout_s=9)
    story = Story(fleet(host("h1", build("w1"), updates=(quiet,)), host("h2", updates=())), authority)
    story.give(Tick())
    assert story.wave_is("started")
    story.report(frozen=False, pause_s=0.0)
    assert (story.rollout.status, story.ends()) == ("completed", [])


@pytest.fixture
def pair(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> Story:
    """A first wave of two hosts, a second one of the third."""
    everybody = fleet(host("h1", build("w1")), host("h2", build("w2")), host("h3", build("w3", domain=1)))
    return Story(everybody, authority)


def _report_of(story: Story, host: str, status: m.OperationStatus, **result: Any) -> m.OperationReported:
    operation = next(each for each in story.wave.operations if each.host == host)
    vms = tuple(
        m.VmResult(
            **{
                "vm": vm.vm,
                "set": vm.set,
                "update_domain": vm.update_domain,
                "state": "running",
                "frozen": True,
                **result,
            }
        )
        for vm in story.wave.vms
        if vm.host == host
    )
    return m.OperationReported(
        operation=operation.operation, host=host, epoch=1, status=status, vms=vms, at=story.now
    )


@pytest.mark.parametrize("synced", [True, False])
def test_a_host_that_did_its_part_is_verified_with_those_that_tried_again(synced: bool, pair: Story) -> None:
    pair.started()
    first = pair.wave.operations[0].operation
    pair.give(_report_of(pair, "h1", "completed")).give(_report_of(pair, "h2", "failed"))
    assert pair.is_("halted")
    verdict = m.VmClockSynced(
        vm="w1",
        host="h1",
        set="web",
        update_domain=0,
        operation=first,
        synced=synced,
        by="agent",
        reason="" if synced else "no answer",
        at=pair.now,
    )
    pair.give(verdict)  # it comes late, when the wave has failed already
    pair.give(Resume())
    assert [event.resources for event in pair.wave.events] == [("w2",)]
    pair.ready().approve().give(Tick())
    assert [each.host for each in pair.due_commands()] == ["h2"]
    pair.give(_report_of(pair, "h2", "completed"))
    second = pair.wave.operations[0].operation
    pair.give(msgspec.structs.replace(verdict, vm="w2", host="h2", operation=second, synced=True))
    if synced:
        assert [wave.status for wave in pair.rollout.waves] == ["completed", "scheduled"]
    else:
        assert pair.is_("halted")
        assert "w1 is unsynced" in pair.rollout.reason
        pair.give(Resume())  # now the operator has seen it, and accepts it
        assert pair.rollout.waves[0].status == "completed"


def test_a_verdict_of_an_earlier_attempt_that_was_lost_is_asked_for_again(pair: Story) -> None:
    pair.started().give(_report_of(pair, "h1", "completed")).give(_report_of(pair, "h2", "failed"))
    pair.give(Resume()).ready().approve().give(Tick()).give(_report_of(pair, "h2", "completed"))
    asked = [each for each in pair.due_commands() if isinstance(each, m.StartOperation)]
    assert [each.host for each in asked] == ["h1", "h2"]
    assert all(each.not_after <= pair.now for each in asked), "a host that forgot must not pause again"


def test_a_host_speaks_only_for_itself(pair: Story) -> None:
    pair.started()
    before = pair.rollout
    pair.give(msgspec.structs.replace(_report_of(pair, "h1", "completed"), host="h2"))
    operation = pair.wave.operations[0].operation
    for vm, host in (("w1", "h2"), ("w2", "h1")):
        pair.give(
            m.VmClockSynced(
                vm=vm,
                host=host,
                set="web",
                update_domain=0,
                operation=operation,
                synced=True,
                by="agent",
                at=T0,
            )
        )
    assert pair.rollout == before


@pytest.mark.parametrize(
    ("first", "then"), [("completed", "failed"), ("failed", "completed"), ("completed", "accepted")]
)
def test_the_first_end_that_a_host_reports_stands(
    first: m.OperationStatus, then: m.OperationStatus, pair: Story
) -> None:
    """A late, repeated or contradicting report of an operation that is over changes nothing (I9)."""
    pair.started()
    pair.give(_report_of(pair, "h1", first))
    pair.give(_report_of(pair, "h1", then, pause_s=9.0))
    (operation,) = (each for each in pair.wave.operations if each.host == "h1")
    assert operation.status == first
    assert operation.vms[0].pause_s == 0.0


def test_a_report_that_leaves_a_vm_out_verifies_nothing(story: Story) -> None:
    story.started()
    silent = msgspec.structs.replace(_report_of(story, "h1", "completed"), vms=())
    story.give(silent).clocks()
    assert story.is_("halted")
    assert "reported nothing about it" in story.rollout.reason


def test_a_coordinator_that_returns_commands_no_freeze_while_another_ones_pause_lasts(story: Story) -> None:
    story.started()
    whole = story.fleet
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c2", epoch=3)
    assert story.give(Tick()).commands() == [], "no host has acknowledged the new epoch"
    acknowledged = whole
    for inventory in whole.inventories.values():
        acknowledged = _told(acknowledged, msgspec.structs.replace(inventory, epoch=3, coordinator="c2"))
    h2 = acknowledged.inventories["h2"]
    story.fleet = _told(acknowledged, msgspec.structs.replace(h2, operation="another's"))
    assert story.give(Tick()).commands() == []
    assert "busy with operation another's" in story.wave.waiting_for
    story.fleet = _with_vm(acknowledged, "h2", state="paused")
    assert story.give(Tick()).commands() == []
    story.fleet = acknowledged
    assert story.give(Tick()).commands() == ["StartOperation"]


def test_a_coordinator_that_returns_commands_no_freeze_while_a_host_of_the_set_has_vanished(
    story: Story,
) -> None:
    story.started()
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c2", epoch=3)
    for inventory in story.fleet.inventories.values():
        story.fleet = _told(story.fleet, msgspec.structs.replace(inventory, epoch=3, coordinator="c2"))
    whole = story.fleet
    story.fleet = _told(whole, *_gone("h2"))
    assert story.give(Tick()).commands() == []
    assert story.wave.waiting_for == "h2 has not reported an inventory"
    story.fleet = whole
    assert story.give(Tick()).commands() == ["StartOperation"]


def test_while_hosts_are_in_the_way_a_message_is_no_reason_to_look_at_all_of_them_again(story: Story) -> None:
    """A leader that takes over a large fleet receives thousands before its hosts obey it; the clock comes a few times a second."""
    story.started()
    whole = story.fleet
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c2", epoch=3)
    assert story.give(Tick()).commands() == []
    assert story.wave.waiting_for
    for inventory in whole.inventories.values():
        story.fleet = _told(story.fleet, msgspec.structs.replace(inventory, epoch=3, coordinator="c2"))
    ready = m.VmReady(vm="w1", event_id=story.wave.events[0].event_id, ready=True)
    assert story.give(ready).commands() == []
    assert story.give(Tick()).commands() == ["StartOperation"]


def test_a_coordinator_that_returns_goes_on_with_its_own_pause(story: Story) -> None:
    story.started()
    mine = story.wave.operations[0].operation
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c2", epoch=2)
    for inventory in story.fleet.inventories.values():
        story.fleet = _told(story.fleet, msgspec.structs.replace(inventory, epoch=2, coordinator="c2"))
    h1 = story.fleet.inventories["h1"]
    paused = (msgspec.structs.replace(h1.vms[0], state="paused"),)
    story.fleet = _told(story.fleet, msgspec.structs.replace(h1, operation=mine, vms=paused))
    assert story.give(Tick()).commands() == ["StartOperation"]
    story.fleet = _told(story.fleet, msgspec.structs.replace(h1, operation="", vms=paused))
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c3", epoch=3)
    assert story.give(Tick()).commands() == []


def test_an_abort_needs_no_fence(story: Story) -> None:
    story.started()
    story.rollout = after_restart(story.rollout, story.now)
    story.authority = Authority(coordinator="c2", epoch=2)
    assert story.give(Abort()).commands() == ["AbortOperation"]


def test_a_gate_that_opened_again_is_waited_for_anew(two_hosts: FleetLookup, authority: Authority) -> None:
    story = Story(two_hosts, authority, soak_s=1000.0).started().report().clocks()
    ill = _told(two_hosts, _AGENT_GONE)
    for _ in range(3):
        story.fleet = ill
        story.give(Tick(), 15)
        assert "agent is offline" in story.wave.waiting_for
        story.fleet = two_hosts
        story.give(Tick(), 15)
        assert story.wave.waiting_for == ""
    assert story.wave_is("soaking")


def test_agents_may_say_again_what_a_coordinator_that_was_away_did_not_hear(story: Story) -> None:
    story.announce().approve()
    story.now += timedelta(seconds=100)
    story.rollout = after_restart(story.rollout, story.now)
    story.give(Tick())
    assert story.wave_is("scheduled")
    story.give(Tick(), 29)
    assert story.wave_is("scheduled")
    story.give(Tick(), 1)
    assert story.is_("halted")
    assert "no answer of the agent" in story.rollout.reason


def test_agents_that_are_on_their_way_back_after_an_outage_of_the_broker_are_waited_for(story: Story) -> None:
    story.fleet = story.fleet.with_reconnect_grace(T0 + timedelta(seconds=90))
    story.announce().approve().give(Tick(), 60)
    assert story.wave_is("scheduled"), "NotBefore has come, and nobody has answered"
    story.give(Tick(), 30)
    assert story.is_("halted")
    assert "no answer of the agent" in story.rollout.reason


def test_approval_counts_only_from_a_vm_of_the_set(story: Story) -> None:
    story.announce().ready()
    event_id = story.wave.events[0].event_id
    story.give(Approve(event_id=event_id, by="nobody"))
    assert story.wave_is("scheduled")
    story.give(
        Approve(event_id=event_id, by="w2")
    )  # of the same set, not of this wave: it sees the event too
    assert story.wave_is("started")


@pytest.mark.parametrize("which", ["made up", "of another set", "of an earlier attempt", "empty"])
def test_approval_counts_only_for_the_event_that_it_names(
    which: str,
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    """A workload approves what it saw: an id it kept from before, or took from elsewhere, starts no pause (I5)."""
    two_sets = fleet(host("h1", build("w1"), build("d1", "db")), host("h2", build("w2", domain=1)))
    story = Story(two_sets, authority).announce().ready()
    earlier = {event.set: event.event_id for event in story.wave.events}
    assert set(earlier) == {"web", "db"}
    if which == "of an earlier attempt":
        story.ready(ready=False)
        assert story.is_("halted")
        story.give(Resume()).ready()
        assert story.wave_is("scheduled")
    ids = {event.set: event.event_id for event in story.wave.events}
    strange = {
        "made up": "00000000-0000-0000-0000-000000000000",
        "of another set": ids["db"],
        "of an earlier attempt": earlier["web"],
        "empty": "",
    }[which]
    story.give(Approve(event_id=ids["db"], by="d1"))
    story.give(Approve(event_id=strange, by="w1")).give(Tick(), 1)
    assert {event.set: event.approved_by for event in story.wave.events} == {"web": "", "db": "d1"}
    assert story.wave_is("scheduled")
    story.give(Approve(event_id=ids["web"].lower(), by="w1"))
    assert story.wave_is("started")


def test_reasons_name_the_first_and_count_the_rest(
    build: Callable[..., m.VmRecord],
    host: Callable[..., m.HostInventory],
    fleet: Callable[..., FleetLookup],
    authority: Authority,
) -> None:
    story = Story(fleet(*(host(f"h{each}", build(f"w{each}")) for each in range(1, 51))), authority)
    story.started().report("failed", "x" * 4000)
    assert story.is_("halted")
    assert "and 42 more" in story.rollout.reason
    assert len(story.rollout.reason) <= 1000
