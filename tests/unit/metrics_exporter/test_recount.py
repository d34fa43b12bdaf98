"""What is counted as messages come is, after every message, what looking at everything would count."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.contract.parts import WholeRollout
from caesura_metrics_exporter.metrics.agents import AGENT_SILENT_S, PRESENCES
from caesura_metrics_exporter.metrics.census import VM_STATES
from caesura_metrics_exporter.metrics.current_state import FleetMetricsView
from caesura_metrics_exporter.metrics.fleet_families import fleet_families
from caesura_metrics_exporter.metrics.pauses import HOSTS_NAMED_S, LongestPause, Pauses
from caesura_metrics_exporter.rollout_index import ROLLOUTS_KEPT, RolloutIndex
from caesura_testing.rollouts import wave_state, whole_rollout

AT = datetime(2026, 4, 20, 22, 26, 58, tzinfo=UTC)
VMS = ("a", "b", "c", "d")
HOSTS = ("h1", "h2")
SETS = ("s1", "s2")

vms, hosts, sets = (st.sampled_from(names) for names in (VMS, HOSTS, SETS))
domains = st.sampled_from((0, 1))
errors_s = st.none() | st.sampled_from([-9.0, -0.002, 0.001, 0.002, 9.0])
records = st.builds(
    m.VmRecord,
    vm=vms,
    set=sets,
    update_domain=domains,
    fault_domain=domains,
    state=st.sampled_from(get_args(m.VmState)),
    state_detail=st.sampled_from(["", "its application has ended"]),
    agent=st.booleans(),
)
inventories = st.builds(
    m.HostInventory,
    host=hosts,
    driver=st.just("process"),
    epoch=st.just(1),
    vms=st.lists(records, max_size=4, unique_by=lambda record: record.vm).map(tuple),
    operation=st.sampled_from(["", "op"]),
)
of_pause: dict[str, Any] = {
    "vm": vms,
    "host": hosts,
    "set": sets,
    "update_domain": domains,
    "operation": st.sampled_from(["op1", "op2"]),
    "method": st.sampled_from(["freeze", "swap"]),
    "budget_s": st.sampled_from([5.0, 10.0]),
    "at": st.just(AT),
}
frozen = st.builds(m.VmFrozen, **of_pause)
resumed = st.builds(
    m.VmResumed,
    **of_pause,
    pause_s=st.sampled_from([1.0, 2.0, 3.0]),
    within_budget=st.booleans(),
    resumed_by=st.sampled_from(["updater", "guard"]),
)
messages = st.one_of(
    inventories,
    frozen,
    resumed,
    st.builds(m.AgentPresence, vm=vms, online=st.booleans(), boot_id=st.just("b")),
    st.builds(
        m.VmClockSynced,
        vm=vms,
        host=hosts,
        set=sets,
        update_domain=domains,
        synced=st.booleans(),
        by=st.just("agent"),
        error_before_s=errors_s,
        error_after_s=errors_s,
        at=st.just(AT),
    ),
    st.builds(
        m.AgentClockSynced,
        vm=vms,
        boot_id=st.just("b"),
        trigger=st.just("interval"),
        synced=st.booleans(),
        exchanges=st.sampled_from([0, 4]),
        error_after_s=errors_s,
        refused_step_s=st.none() | st.just(99.0),
    ),
    st.sampled_from([f"caesura/v1/host/{host}/inventory" for host in HOSTS]),
    st.sampled_from([f"caesura/v1/vm/{vm}/presence" for vm in VMS]),
)


def _shown(state: str, record: m.VmRecord) -> str:
    return "impaired" if state == "running" and record.state_detail else state


def recounted(fleet: FleetMetricsView, now_s: float) -> dict[str, Any]:
    """Everything, from every VM's own facts."""
    states: Counter[tuple[str, ...]] = Counter()
    agents: Counter[tuple[str, ...]] = Counter()
    unsynced: Counter[tuple[str, ...]] = Counter()
    refused: Counter[tuple[str, ...]] = Counter()
    errors: dict[tuple[str, ...], list[float]] = {}
    for state in fleet.hosts.values():
        for record in state.inventory.vms if state.inventory is not None else ():
            domain = (record.set, str(record.update_domain))
            for each in VM_STATES:
                states[*domain, each] += each == _shown(fleet.vm_states.get(record.vm, record.state), record)
            if record.agent:
                known = fleet.agents._agents.get(record.vm)
                presence = "offline"
                if known is not None and known.online:
                    presence = "silent" if now_s - known.received_s > AGENT_SILENT_S else "online"
                for name in PRESENCES:
                    agents[record.set, name] += name == presence
            verdict = fleet.clocks.get(record.vm)
            unsynced[domain] += verdict is not None and not verdict.synced
            refused[domain] += fleet.clocks.refused(record.vm)
            for when, error_s in (
                ("before", verdict.before_s if verdict is not None else None),
                ("after", verdict.after_s if verdict is not None else None),
            ):
                if error_s is not None:
                    errors.setdefault((*domain, when), []).append(error_s)
    return {
        "caesura_vms": states,
        "caesura_agents": agents,
        "caesura_vms_unsynced": unsynced,
        "caesura_vms_clock_step_refused": refused,
        "caesura_clock_error_last_seconds": errors,
    }


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(messages, st.booleans(), st.sampled_from([0.0, 1.0, 299.0, 301.0])), min_size=1, max_size=25
    )
)
def test_the_present_is_counted_as_a_recount_would(steps: list[tuple[Message | str, bool, float]]) -> None:
    fleet, now_s = FleetMetricsView(), 0.0
    for message, stored, later_s in steps:
        now_s += later_s
        if isinstance(message, str):
            fleet.clear(message)
        else:
            fleet.take(message, now_s, fresh=True, stored=stored)
        told = {family.name: family.values for family in fleet_families(fleet, now_s)}
        wanted = recounted(fleet, now_s)
        errors = wanted.pop("caesura_clock_error_last_seconds")
        for name, counts in wanted.items():
            assert told[name] == dict(counts), name
        worst = told["caesura_clock_error_last_seconds"]
        assert worst.keys() == errors.keys()
        for labels, error_s in worst.items():
            assert error_s in errors[labels]
            assert abs(error_s) == max(map(abs, errors[labels]))


class Naive:
    """Pauses as a list that is looked through."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[tuple[str, str, str, str], int, float, bool]] = {}
        """VM to (set, update domain, host, method), domain, since when, whether by a fact."""
        self.budgets: dict[tuple[str, str, str, str], float] = {}
        self.last: dict[tuple[str, str, str, str], LongestPause] = {}
        self.longest: dict[tuple[str, str, str], float] = {}
        self.clashes: Counter[str] = Counter()
        self.ages: dict[str, dict[tuple[str, str, str, str], float]] = {"late": {}, "guard": {}}

    def froze(self, message: m.VmFrozen, now_s: float) -> None:
        labels = (message.set, str(message.update_domain), message.host, message.method)
        self.open.pop(message.vm, None)
        domain = message.update_domain
        self.clashes[message.set] += any(
            each[0][0] == message.set and each[3] and each[1] != domain for each in self.open.values()
        )
        self.open[message.vm] = (labels, domain, now_s, True)
        self._budget(labels, message.budget_s)

    def found(self, record: m.VmRecord, host: str, now_s: float) -> None:
        labels = (record.set, str(record.update_domain), host, "unknown")
        self.open.setdefault(record.vm, (labels, record.update_domain, now_s, False))

    def resumed(self, message: m.VmResumed, now_s: float) -> None:
        labels = (message.set, str(message.update_domain), message.host, message.method)
        self.open.pop(message.vm, None)
        self._budget(labels, message.budget_s)
        known, longest = self.last.get(labels), message.pause_s
        if known is not None and known.operation == message.operation:
            longest = max(longest, known.seconds)
        self.last[labels] = LongestPause(message.operation, longest, message.budget_s)
        short = (labels[0], labels[1], labels[3])
        self.longest[short] = max(message.pause_s, self.longest.get(short, 0.0))
        if not message.within_budget:
            self.ages["late"][labels] = now_s
        if message.resumed_by == "guard":
            self.ages["guard"][labels] = now_s

    def forget_host(self, host: str) -> None:
        self.open = {vm: each for vm, each in self.open.items() if each[0][2] != host}
        self.budgets = {labels: each for labels, each in self.budgets.items() if labels[2] != host}
        self.last = {labels: last for labels, last in self.last.items() if labels[2] != host}
        for name, ages in self.ages.items():
            self.ages[name] = {labels: at_s for labels, at_s in ages.items() if labels[2] != host}

    def forget_set(self, name: str) -> None:
        self.open = {vm: each for vm, each in self.open.items() if each[0][0] != name}
        self.budgets = {labels: each for labels, each in self.budgets.items() if labels[0] != name}
        self.last = {labels: last for labels, last in self.last.items() if labels[0] != name}
        self.longest = {labels: each for labels, each in self.longest.items() if labels[0] != name}
        self.clashes.pop(name, None)

    def _budget(self, labels: tuple[str, str, str, str], budget_s: float) -> None:
        self.budgets.pop(labels, None)
        self.budgets[labels] = budget_s

    def check(self, pauses: Pauses, now_s: float) -> None:
        """Everything that ``pauses`` says is what is found here."""
        by_kind: dict[tuple[str, str, str], float] = {}
        by_host: dict[tuple[str, str, str, str], float] = {}
        for labels, _, since_s, _ in self.open.values():
            short = (labels[0], labels[1], labels[3])
            by_kind[short] = max(now_s - since_s, by_kind.get(short, 0.0))
            by_host[labels] = max(now_s - since_s, by_host.get(labels, 0.0))
        assert pauses.open_s(now_s) == by_kind
        on_hosts = pauses.on_hosts(now_s)
        assert {labels: each.open_s for labels, each in on_hosts.items()} == by_host
        assert {labels: each.budget_s for labels, each in on_hosts.items()} == {
            labels: self.budgets.get(labels) for labels in by_host
        }
        assert pauses.budgets() == {(a, b, d): budget_s for (a, b, _, d), budget_s in self.budgets.items()}
        last: dict[tuple[str, str, str], set[float]] = {}
        for labels, pause in self.last.items():
            last.setdefault((labels[0], labels[1], labels[3]), set()).add(pause.seconds)
        assert {labels: each.seconds for labels, each in pauses.last().items()} == {
            labels: max(seconds) for labels, seconds in last.items()
        }
        assert all(each in self.last.values() for each in pauses.last().values())
        assert pauses.longest() == self.longest
        assert pauses.clashes == self.clashes
        for name in SETS:
            seen = {(each[3], each[1]) for each in self.open.values() if each[0][0] == name}
            assert pauses.domains(name) == max(
                sum(fact == kind for fact, _ in seen) for kind in (True, False)
            )
        for said, kept in (
            (pauses.overran_s(now_s), self.ages["late"]),
            (pauses.guarded_s(now_s), self.ages["guard"]),
        ):
            assert said == {
                labels: now_s - at_s for labels, at_s in kept.items() if now_s - at_s <= HOSTS_NAMED_S
            }


pause_steps = st.one_of(
    frozen,
    resumed,
    st.tuples(st.just("found"), records, hosts),
    st.tuples(st.just("runs"), vms, st.booleans()),
    st.tuples(st.just("vm"), vms),
    st.tuples(st.just("host"), hosts),
    st.tuples(st.just("set"), sets),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(pause_steps, st.sampled_from([0.0, 1.0, HOSTS_NAMED_S])), min_size=1, max_size=30))
def test_pauses_are_what_looking_through_all_of_them_finds(steps: list[tuple[Any, float]]) -> None:
    pauses, naive, now_s = Pauses(), Naive(), 0.0
    for step, later_s in steps:
        now_s += later_s
        match step:
            case m.VmFrozen():
                pauses.froze(step, step.update_domain, now_s)
                naive.froze(step, now_s)
            case m.VmResumed():
                pauses.resumed(step, now_s)
                naive.resumed(step, now_s)
            case ("found", record, host):
                pauses.found(record, host, record.update_domain, now_s)
                naive.found(record, host, now_s)
            case ("runs", vm, under_way):
                stays = under_way and vm in naive.open and naive.open[vm][3]
                assert pauses.runs(vm, under_way=under_way) is not stays
                if not stays:
                    naive.open.pop(vm, None)
            case ("vm", vm):
                pauses.forget_vm(vm)
                naive.open.pop(vm, None)
            case ("host", host):
                pauses.forget_host(host)
                naive.forget_host(host)
            case ("set", name):
                pauses.forget_set(name)
                naive.forget_set(name)
        naive.check(pauses, now_s)


@st.composite
def rollouts(draw: st.DrawFn) -> WholeRollout:
    minute = draw(st.integers(0, 5))
    names = tuple(sorted(draw(st.sets(sets, min_size=1))))
    waves = tuple(
        wave_state(
            wave=number,
            status=draw(st.sampled_from(get_args(m.WaveStatus))),
            domains={name: draw(domains) for name in draw(st.sets(st.sampled_from(names), min_size=1))},
            hosts=("h1",),
            vms=("a",),
            started_at=draw(st.none() | st.integers(0, 9).map(lambda s: AT + timedelta(seconds=s))),
            ended_at=draw(st.none() | st.integers(0, 9).map(lambda s: AT + timedelta(seconds=s))),
        )
        for number in range(draw(st.integers(0, 3)))
    )
    return whole_rollout(
        rollout=f"r{minute}",
        update="u",
        status=draw(st.sampled_from(get_args(m.RolloutStatus))),
        policy=m.Policy(),
        sets=names,
        waves=waves,
        created_at=AT + timedelta(minutes=minute),
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(rollouts() | st.sampled_from([f"r{number}" for number in range(6)]), max_size=12))
def test_rollouts_of_sets_are_what_looking_through_all_of_them_finds(
    steps: list[WholeRollout | str],
) -> None:
    index, known = RolloutIndex(), dict[str, WholeRollout]()
    telling = ("started", "verifying", "soaking", "scheduled", "failed", "cancelled", "pending", "completed")
    for step in steps:
        if isinstance(step, str):
            index.forget(step)
            known.pop(step, None)
        else:
            index.take(step)
            known[step.rollout] = step
        assert index.known == known
        chosen: dict[str, WholeRollout] = {}
        over = ("completed", "aborted")
        for each in sorted(known.values(), key=lambda each: (each.status not in over, each.created_at)):
            chosen.update(dict.fromkeys(each.sets, each))
        assert index.of_sets() == chosen
        for name in SETS:
            assert index.of_set(name) == chosen.get(name)
            assert {each.rollout for each in index.under_way(name)} == {
                each.rollout for each in known.values() if name in each.sets and each.status not in over
            }
        for name, rollout in chosen.items():
            mine = [wave for wave in rollout.waves if name in wave.domains]
            found = index.progress(rollout).get(name)
            assert (found is None) == (not mine)
            if found is None:
                continue
            assert (found.waves, found.completed) == (
                len(mine),
                sum(wave.status == "completed" for wave in mine),
            )
            for domain in {wave.domains[name] for wave in mine}:
                waves = [wave for wave in mine if wave.domains[name] == domain]
                assert found.status[domain] == min((wave.status for wave in waves), key=telling.index)
                started = [wave.started_at.timestamp() for wave in waves if wave.started_at]
                assert found.started.get(domain) == max(started, default=None)
                ended = [(wave.ended_at.timestamp(), wave.status) for wave in waves if wave.ended_at]
                assert found.ended.get(domain) == max(ended, default=None)


def test_the_oldest_rollout_leaves_no_trace_in_the_index() -> None:
    index = RolloutIndex()
    for number in range(ROLLOUTS_KEPT + 5):
        index.take(
            whole_rollout(
                rollout=f"r{number}",
                update="u",
                status="completed",
                policy=m.Policy(),
                sets=(f"s{number}",),
                waves=(),
                created_at=AT + timedelta(minutes=number),
            )
        )
    assert len(index.known) == len(index.of_sets()) == ROLLOUTS_KEPT
    assert index.of_set("s0") is None
