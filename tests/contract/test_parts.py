"""Messages in parts: whole again in whatever order they come, and never two moments taken for one."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from caesura.contract import messages as m
from caesura.contract.codec import (
    MAX_PAYLOAD_BYTES,
    Malformed,
    Oversized,
    Received,
    decode,
    encode,
    size_bytes,
)
from caesura.contract.envelope import Message
from caesura.contract.parts import Joiner, WholeRollout, answer_in_parts, inventory_in_parts, with_parts
from caesura.contract.topics import channel_of
from caesura_testing.rollouts import changed, sent, wave_state, whole_rollout

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def received(message: Message, **parameters: str | int) -> Received:
    """As it comes from the bus."""
    topic = channel_of(type(message)).topic(**parameters)
    return decode(topic, encode(message, source="/caesura/x", event_id="e", time=NOW))


def plan(hosts: int, vms: int) -> m.RequestAnswered:
    """A plan of names of 60 characters in waves of one domain, a tenth of the VMs skipped, and two refusals."""
    planned = [
        m.PlannedVm(
            vm=f"vm-{host:04d}-{number:03d}".ljust(60, "v"),
            set=f"set-{number % 50:02d}".ljust(60, "s"),
            update_domain=host % 20,
            host=f"host-{host:04d}".ljust(60, "h"),
            method="freeze",
            reason="the update is of scope host: every VM of the host pauses",
            proofs=("digest_equal", "canary_equal"),
        )
        for host in range(hosts)
        for number in range(vms)
    ]
    waves: list[m.PlannedWave] = []
    for domain in range(20):
        mine = tuple(each for each in planned if each.update_domain == domain)
        if mine:
            waves.append(
                m.PlannedWave(
                    wave=len(waves),
                    domains={each.set: domain for each in mine},
                    hosts=tuple(dict.fromkeys(each.host for each in mine)),
                    vms=mine,
                )
            )
    return m.RequestAnswered(
        request="q",
        accepted=True,
        plan=m.Plan(
            update="u",
            waves=tuple(waves),
            skipped=tuple(replace(each, skip="stopped") for each in planned[::10]),
            refusals=(m.Refusal(subject="x", reason="y", code="too_large"),) * 2,
            estimate_s=9.0,
        ),
    )


def record(number: int, *, state: m.VmState = "running") -> m.VmRecord:
    return m.VmRecord(
        vm=f"vm-{number:05d}".ljust(60, "v"),
        set="s" * 60,
        update_domain=0,
        state=state,
        methods_missing={"live": "why not " * 40},
    )


def inventory(count: int, *, state: m.VmState = "running", operation: str = "") -> m.HostInventory:
    return m.HostInventory(
        host="h",
        driver="d",
        epoch=1,
        vms=tuple(record(number, state=state) for number in range(count)),
        operation=operation,
    )


def test_a_plan_for_ten_thousand_vms_with_long_names_fits_into_messages() -> None:
    whole = plan(1000, 10)
    head, parts = answer_in_parts(whole)
    assert size_bytes(head) < 2000
    assert all(size_bytes(each) <= MAX_PAYLOAD_BYTES for each in parts)
    joiner = Joiner()
    for part in parts:
        assert joiner.take(received(part, client="ops", part=part.part)) is None
    joined = joiner.take(received(head, client="ops"))
    assert joined is not None
    assert joined.message == replace(whole, plan_parts=len(parts))


def test_a_small_plan_is_in_its_answer() -> None:
    whole = plan(2, 2)
    assert answer_in_parts(whole) == (whole, [])


def test_a_host_of_a_thousand_vms_with_long_names_fits_into_messages() -> None:
    whole = inventory(1000)
    head, parts = inventory_in_parts(whole)
    assert len(parts) > 1
    assert all(size_bytes(each) <= MAX_PAYLOAD_BYTES for each in (head, *parts))


@cache
def two_moments() -> tuple[list[m.HostInventory], list[list[Received]]]:
    """The same host twice, and the messages of each moment: hundreds of VMs, made once for all examples."""
    wholes, messages = [], []
    for each in (inventory(900), inventory(900, state="paused", operation="op")):
        head, parts = inventory_in_parts(each)
        messages.append([received(part, host="h", part=part.part) for part in parts])
        messages[-1].append(received(head, host="h"))
        wholes.append(replace(each, part_etags=head.part_etags))
    return wholes, messages


@given(st.data())
def test_an_inventory_is_whole_in_any_order_and_always_of_one_moment(data: st.DataObject) -> None:
    """Two moments, the messages of each in any order and mixed: what comes out is one of the two, never a mixture."""
    wholes, messages = two_moments()
    joiner = Joiner()
    seen: list[int] = []
    for message in data.draw(st.permutations(messages[0])) + data.draw(st.permutations(messages[1])):
        whole = joiner.take(message)
        if whole is not None:
            seen.append(wholes.index(whole.message))  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert seen[-1] == 1, "the newest is what a reader has in the end"


def rollout(*statuses: m.WaveStatus) -> WholeRollout:
    return whole_rollout(
        waves=[
            wave_state(wave=number, status=status, domains={"web": number}, vms=(f"w{number}",))
            for number, status in enumerate(statuses)
        ]
    )


@given(st.permutations(range(4)))
def test_a_rollout_is_whole_in_any_order(order: list[int]) -> None:
    whole = rollout("completed", "started", "pending")
    messages = sent(whole)
    joiner = Joiner()
    got = [joiner.take(received(messages[each][0], **messages[each][1])) for each in order]
    assert [each is not None for each in got] == [False] * 3 + [True]
    assert got[-1] is not None
    assert got[-1].message == whole


def test_a_rollout_waits_for_the_wave_that_it_names_and_keeps_no_older_one() -> None:
    joiner, before = Joiner(), rollout("started", "pending")
    for message, parameters in sent(before):
        joiner.take(received(message, **parameters))
    waves = (replace(before.waves[0], status="completed"), replace(before.waves[1], status="started"))
    after = changed(before, waves=waves)
    (first, one), (second, two), (head, parameters) = sent(after)
    assert joiner.take(received(head, **parameters)) is None
    assert joiner.waiting() == ["caesura.rollout.state.v1 r"]
    assert joiner.take(received(first, **one)) is None
    got = joiner.take(received(second, **two))
    assert got is not None
    assert got.message == after
    assert joiner.waiting() == []


def test_a_rollout_without_its_waves_is_whole_at_once() -> None:
    head = sent(rollout("completed"))[-1][0]
    got = Joiner().take(received(replace(head, wave_etags=()), rollout="r"))
    assert got is not None
    assert isinstance(got.message, WholeRollout)
    assert got.message.waves == ()
    assert got.message.wave_count == 1


def test_what_was_removed_is_no_part_of_anything() -> None:
    joiner = Joiner()
    (wave, at), (head, parameters) = sent(rollout("started"))
    joiner.take(received(wave, **at))
    joiner.clear(channel_of(m.WaveState).topic(**at))
    assert joiner.take(received(head, **parameters)) is None
    joiner.clear(channel_of(m.RolloutState).topic(**parameters))
    assert joiner.waiting() == []
    assert joiner.take(received(wave, **at)) is None, "nothing waits for it"


def test_parts_of_plans_that_nobody_completes_are_not_kept() -> None:
    joiner = Joiner()
    for number in range(1000):
        part = m.PlanPart(request=f"q{number}", part=1)
        assert joiner.take(received(part, client="ops", part=1)) is None
        answer = m.RequestAnswered(request=f"q{number}", accepted=True, plan=m.Plan(update="u"), plan_parts=2)
        assert joiner.take(received(answer, client="ops")) is None
    assert len(joiner.waiting()) <= 16


def test_plan_parts_fit_however_many_hosts_and_sets_a_wave_has() -> None:
    vms = tuple(
        m.PlannedVm(
            vm=f"v{number:04d}".ljust(63, "v"),
            set=f"s{number:04d}".ljust(63, "s"),
            update_domain=0,
            host=f"h{number:04d}".ljust(63, "h"),
            method="live",
            reason="live",
        )
        for number in range(1500)
    )
    wave = m.PlannedWave(
        wave=0, domains={vm.set: 0 for vm in vms}, hosts=tuple(vm.host for vm in vms), vms=vms
    )
    whole = m.RequestAnswered(request="q", accepted=True, plan=m.Plan(update="u", waves=(wave,)))
    head, parts = answer_in_parts(whole)
    joiner = Joiner()
    for part in parts:
        joiner.take(received(part, client="ops", part=part.part))
    joined = joiner.take(received(head, client="ops"))
    assert joined is not None
    assert joined.message == replace(whole, plan_parts=len(parts))


def test_a_host_cannot_have_more_vms_in_parts_than_in_its_file() -> None:
    head, parts = inventory_in_parts(inventory(900))
    joiner = Joiner()
    more = m.InventoryPart(host="h", part=len(parts) + 1, etag="0" * 12, vms=inventory(200).vms)
    for part in (*parts, more):
        joiner.take(received(part, host="h", part=part.part))
    with pytest.raises(Oversized, match="more than 1024 VMs"):
        joiner.take(received(replace(head, part_etags=(*head.part_etags, more.etag)), host="h"))
    assert joiner.waiting() == []
    got = joiner.take(received(head, host="h"))
    assert got is not None
    assert len(got.message.vms) == 900  # type: ignore[attr-defined]


def report_part(operation: str, part: int, vms: int) -> Received:
    results = tuple(
        m.VmResult(vm=f"v{part}-{number}", set="s", update_domain=0, state="running", frozen=True)
        for number in range(vms)
    )
    message = m.ReportPart(host="h", operation=operation, part=part, vms=results)
    return received(message, host="h", part=part)


def test_a_report_cannot_name_more_vms_than_a_command() -> None:
    joiner = Joiner()
    for part in (1, 2):
        joiner.take(report_part("o", part, 500))
    with pytest.raises(Oversized, match="more than 1024 VMs"):
        joiner.take(report_part("o", 3, 500))


def test_parts_of_reports_that_nobody_asked_for_are_not_kept() -> None:
    joiner = Joiner(wanted=lambda message: getattr(message, "operation", "") == "mine")
    head = m.OperationReported(operation="mine", host="h", epoch=1, status="completed", vm_parts=1, at=NOW)
    joiner.take(report_part("another", 1, 3))
    joiner.take(report_part("mine", 1, 3))
    got = joiner.take(received(head, host="h"))
    assert got is not None
    assert len(got.message.vms) == 3  # type: ignore[attr-defined]
    joiner.take(report_part("another", 1, 3))
    assert joiner.take(received(replace(head, operation="another"), host="h")) is None


def test_who_subscribes_to_a_message_in_parts_subscribes_to_its_parts() -> None:
    assert with_parts([m.HostInventory, m.VmOwner, m.RolloutState]) == [
        m.HostInventory,
        m.InventoryPart,
        m.VmOwner,
        m.RolloutState,
        m.WaveState,
    ]


@pytest.mark.parametrize("part", [0, 257])
def test_a_part_out_of_bounds_is_refused(part: int) -> None:
    with pytest.raises(Malformed, match=r"\$\.part"):
        received(m.InventoryPart(host="h", part=part, etag="0" * 12, vms=()), host="h", part=part)
