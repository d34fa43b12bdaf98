"""One example of every message with its topic parameters: for the docs, the golden payloads and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message

_T0 = datetime(2026, 4, 20, 22, 11, 58, tzinfo=UTC)
_EVENT = "C7061BAC-AFDC-4513-B24B-AA5F13A16123"
_OPERATION = "0b6c1d8e-6a55-5b54-9a3d-2f4f0a5c9f01"
_ROLLOUT = "20260420-221158-1f3a"
_COMMANDS = (m.StartOperation.TYPE, m.AbortOperation.TYPE)
_MEMORY = m.MemoryProof(
    proof="digest",
    ok=True,
    detail="sampled digest equal: 5d0c; digest equal: 9a41",
    held=("digest_equal", "sampled_digest_equal"),
)


class Example(msgspec.Struct, frozen=True):
    """A message and the parameters of its topic."""

    message: Message
    parameters: Mapping[str, str]


def examples() -> list[Example]:
    """One per row of the topic table, in its order."""
    policy = m.Policy(notice_s=900.0, budget_s=30.0, soak_s=60.0)
    planned = m.PlannedVm(
        vm="web-1",
        set="web",
        update_domain=0,
        host="host-1",
        method="freeze",
        reason="the update is of scope host: every VM of the host pauses",
        proofs=("digest_equal", "sampled_digest_equal", "canary_equal", "not_rebooted"),
    )
    wave = m.WaveState(
        rollout=_ROLLOUT,
        wave=0,
        etag="5f3a0c91d27e",
        status="scheduled",
        domains={"web": 0},
        hosts=("host-1",),
        vms=("web-1",),
        events={"web": _EVENT},
        event_count=1,
        not_before=_T0 + timedelta(seconds=900),
    )
    document_event = m.ScheduledEvent(
        event_id=_EVENT,
        event_type="Freeze",
        status="scheduled",
        resources=("web-1",),
        host="host-1",
        not_before=_T0 + timedelta(seconds=900),
        description="Host server is undergoing maintenance.",
        duration_s=9,
        rollout=_ROLLOUT,
    )
    vm_place = {"host": "host-1", "set": "web", "ud": "0", "vm": "web-1"}
    return [
        Example(
            m.CoordinatorPresence(
                coordinator="coordinator-5d1c9a70", epoch=7, online=True, commands=_COMMANDS
            ),
            {},
        ),
        Example(
            m.RolloutState(
                rollout=_ROLLOUT,
                update="qemu-security",
                status="running",
                policy=policy,
                sets=("web",),
                wave_count=1,
                current_wave=0,
                current_status="scheduled",
                wave_etags=(wave.etag,),
                estimate_s=971.0,
                requested_by="ops",
                created_at=_T0,
            ),
            {"rollout": _ROLLOUT},
        ),
        Example(
            m.WaveChanged(
                rollout=_ROLLOUT, wave=0, status="scheduled", domains={"web": 0}, hosts=("host-1",), at=_T0
            ),
            {"rollout": _ROLLOUT, "wave": "0"},
        ),
        Example(m.SetDocument(set="web", incarnation=2, events=(document_event,)), {"set": "web"}),
        Example(
            m.EventChanged(
                event_id=_EVENT,
                set="web",
                event_type="Freeze",
                status="scheduled",
                resources=("web-1",),
                host="host-1",
                incarnation=2,
                rollout=_ROLLOUT,
                not_before=_T0 + timedelta(seconds=900),
                notice_s=900.0,
                at=_T0,
            ),
            {"set": "web", "status": "scheduled"},
        ),
        Example(
            m.StartOperation(
                operation=_OPERATION,
                epoch=7,
                coordinator="coordinator-5d1c9a70",
                host="host-1",
                rollout=_ROLLOUT,
                wave=0,
                method="freeze",
                targets=(m.OperationTarget(vm="web-1", set="web", update_domain=0, event_id=_EVENT),),
                update="qemu-security",
                budget_s=30.0,
                not_after=_T0 + timedelta(seconds=930),
            ),
            {"host": "host-1"},
        ),
        Example(
            m.AbortOperation(
                operation=_OPERATION,
                epoch=7,
                coordinator="coordinator-5d1c9a70",
                host="host-1",
                reason="aborted by the operator",
            ),
            {"host": "host-1"},
        ),
        Example(
            m.RequestAnswered(
                request="r-1",
                accepted=True,
                rollout=_ROLLOUT,
                plan=m.Plan(
                    update="qemu-security",
                    waves=(m.PlannedWave(wave=0, domains={"web": 0}, hosts=("host-1",), vms=(planned,)),),
                    estimate_s=971.0,
                    expected_pause_s=9.0,
                ),
            ),
            {"client": "ops"},
        ),
        Example(m.HostPresence(host="host-1", online=True, instance="a41f"), {"host": "host-1"}),
        Example(
            m.HostInventory(
                host="host-1",
                driver="process",
                epoch=7,
                coordinator="coordinator-5d1c9a70",
                vms=(
                    m.VmRecord(
                        vm="web-1",
                        set="web",
                        update_domain=0,
                        state="running",
                        methods=("live", "freeze"),
                        methods_missing={"swap": "the process driver has no second process to swap to"},
                        clock="simulated",
                        proofs={
                            "freeze": ("digest_equal", "sampled_digest_equal", "canary_equal", "not_rebooted")
                        },
                    ),
                ),
                updates=(
                    m.UpdateRecord(
                        update="qemu-security",
                        version="1.2",
                        impact="pause",
                        scope="host",
                        expected_s=9.0,
                        timeout_s=20.0,
                    ),
                ),
                refused_updates=(m.RefusedUpdate(file="typo.toml", line=3, reason="unknown key 'impcat'"),),
                guard="ready",
                commands=_COMMANDS,
                installed=(m.InstalledUpdate(update="qemu-security", version="1.2", at=_T0),),
            ),
            {"host": "host-1"},
        ),
        Example(
            m.OperationReported(
                operation=_OPERATION,
                host="host-1",
                epoch=7,
                rollout=_ROLLOUT,
                status="completed",
                vms=(
                    m.VmResult(
                        vm="web-1",
                        set="web",
                        update_domain=0,
                        state="running",
                        frozen=True,
                        pause_s=8.734,
                        resumed_by="updater",
                        memory=_MEMORY,
                    ),
                ),
                update=m.UpdateOutcome(
                    update="qemu-security", outcome="succeeded", exit_code=0, seconds=8.71
                ),
                overhead_s=0.024,
                at=_T0,
            ),
            {"host": "host-1"},
        ),
        Example(
            m.VmFrozen(
                vm="web-1",
                host="host-1",
                set="web",
                update_domain=0,
                operation=_OPERATION,
                event_id=_EVENT,
                method="freeze",
                budget_s=30.0,
                at=_T0,
            ),
            vm_place,
        ),
        Example(
            m.VmResumed(
                vm="web-1",
                host="host-1",
                set="web",
                update_domain=0,
                operation=_OPERATION,
                event_id=_EVENT,
                method="freeze",
                pause_s=8.734,
                budget_s=30.0,
                within_budget=True,
                resumed_by="updater",
                memory=_MEMORY,
                at=_T0,
            ),
            vm_place,
        ),
        Example(
            m.VmClockSynced(
                vm="web-1",
                host="host-1",
                set="web",
                update_domain=0,
                operation=_OPERATION,
                synced=True,
                by="agent",
                error_before_s=-8.735,
                error_after_s=0.0003,
                uncertainty_s=0.0004,
                simulated=True,
                memory=m.MemoryProof(
                    proof="heartbeat",
                    ok=True,
                    detail="not rebooted: boot id f3b1c2; canary equal: 1024 pages of 4096 bytes",
                    held=("canary_equal", "not_rebooted"),
                ),
                at=_T0,
            ),
            vm_place,
        ),
        Example(
            m.ClockSyncAnswered(
                vm="web-1",
                host="host-1",
                exchange="x1",
                t1_ns=1_776_723_118_000_000_000,
                t2_ns=1_776_723_126_735_400_000,
                t3_ns=1_776_723_126_735_500_000,
            ),
            {"host": "host-1", "vm": "web-1"},
        ),
        Example(
            m.AgentPresence(
                vm="web-1",
                online=True,
                boot_id="f3b1c2",
                clock="simulated",
                canary_bytes=4_194_304,
                canary_writes=5120,
            ),
            {"vm": "web-1"},
        ),
        Example(m.VmReady(vm="web-1", event_id=_EVENT, ready=True), {"vm": "web-1"}),
        Example(
            m.ClockSyncRequested(vm="web-1", exchange="x1", t1_ns=1_776_723_118_000_000_000),
            {"vm": "web-1"},
        ),
        Example(
            m.AgentClockSynced(
                vm="web-1",
                boot_id="f3b1c2",
                trigger="resume",
                operation=_OPERATION,
                synced=True,
                error_before_s=-8.735,
                error_after_s=0.0003,
                uncertainty_s=0.0004,
                exchanges=16,
                simulated=True,
                canary=m.CanaryReport(pages=1024, writes=5184),
            ),
            {"vm": "web-1"},
        ),
        Example(
            m.HookFinished(
                vm="web-1",
                hook="prepare",
                event_id=_EVENT,
                outcome="succeeded",
                exit_code=0,
                seconds=0.21,
            ),
            {"vm": "web-1"},
        ),
        Example(m.PublisherPresence(instance="fleet", online=True), {"instance": "fleet"}),
        Example(m.EventApproved(event_id=_EVENT, set="web", vm="web-1", at=_T0), {"instance": "fleet"}),
        Example(
            m.RolloutRequested(
                request="r-1", update="qemu-security", selection=m.Selection(sets=("web",)), policy=policy
            ),
            {"client": "ops"},
        ),
        Example(
            m.FreezeRequested(
                request="r-2",
                selection=m.Selection(vms=("web-1",)),
                hold_s=9.0,
                policy=m.Policy(notice_s=15.0),
            ),
            {"client": "ops"},
        ),
        Example(m.AbortRequested(request="r-3", rollout=_ROLLOUT, reason="wrong update"), {"client": "ops"}),
        Example(m.ResumeRequested(request="r-4", rollout=_ROLLOUT), {"client": "ops"}),
        Example(m.VmOwner(vm="web-1", host="host-1", epoch=3, contested_by=("host-2",)), {"vm": "web-1"}),
        Example(
            m.VmApproved(event_id=_EVENT, set="web", vm="web-1", at=_T0), {"instance": "fleet", "vm": "web-1"}
        ),
        Example(
            m.VmStatus(
                vm="web-1",
                host="host-1",
                set="web",
                update_domain=1,
                state="running",
                last_pause=m.LastPause(
                    operation=_OPERATION,
                    method="freeze",
                    pause_s=2.1,
                    within_budget=True,
                    resumed_by="updater",
                    at=_T0,
                ),
                at=_T0,
            ),
            {"host": "host-1", "vm": "web-1"},
        ),
        Example(wave, {"rollout": _ROLLOUT, "wave": "0"}),
        Example(
            m.InventoryPart(
                host="host-1",
                part=1,
                etag="b1c0ffee0042",
                vms=(
                    m.VmRecord(
                        vm="web-1", set="web", update_domain=0, state="running", methods=("live", "freeze")
                    ),
                ),
            ),
            {"host": "host-1", "part": "1"},
        ),
        Example(
            m.ReportPart(
                host="host-1",
                operation=_OPERATION,
                part=1,
                vms=(
                    m.VmResult(
                        vm="web-1",
                        set="web",
                        update_domain=0,
                        state="running",
                        frozen=True,
                        pause_s=2.1,
                        resumed_by="updater",
                    ),
                ),
            ),
            {"host": "host-1", "part": "1"},
        ),
        Example(
            m.PlanPart(
                request="r-1",
                part=1,
                waves=(m.PlannedWave(wave=0, domains={"web": 0}, hosts=("host-1",), vms=(planned,)),),
            ),
            {"client": "ops", "part": "1"},
        ),
        Example(
            m.VmDetails(
                vm="web-1",
                host="host-1",
                size="Standard_D2s_v5",
                image=m.VmImage(publisher="Debian", offer="debian-12", sku="12", version="latest"),
                zone="1",
                tags={"team": "shop"},
                interfaces=(m.VmInterface(mac="00:0d:3a:f8:06:ec", ipv4="10.0.0.4/24"),),
                computer_name="web-1.example",
                user_data="I2Nsb3VkLWNvbmZpZwo=",
            ),
            {"host": "host-1", "vm": "web-1"},
        ),
        Example(
            m.CoordinatorStatus(
                coordinator="coordinator-2", online=True, leads=False, waits_for="another coordinator leads"
            ),
            {"coordinator": "coordinator-2"},
        ),
        Example(m.FleetResyncRequested(coordinator="coordinator-5d1c9a70", spread_s=1.0), {}),
        Example(m.AgentResyncRequested(vm="web-1"), {"vm": "web-1"}),
        Example(m.PublisherResyncRequested(instance="fleet"), {"instance": "fleet"}),
        Example(m.ClientResyncRequested(client="ops"), {"client": "ops"}),
        Example(m.ExporterResyncRequested(instance="exporter"), {"instance": "exporter"}),
    ]
