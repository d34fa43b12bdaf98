"""The rules seen to hold: real processes, a real broker, and every part of the host updater killed in turn.

What is asserted about VMs is read from the kernel (cgroup files, /proc), not from our own messages.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from caesura.contract.messages import HostInventory, VmResumed, VmStatus
from caesura_testing.patience import patient
from caesura_vmcontrol.procfs import read_process

IGNORES_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


async def test_updater_killed_while_vms_are_frozen(
    hosts: Callable[..., Any], fleet: Any, wait_for: Any, freezer: str
) -> None:
    host = hosts(freezer=freezer)
    host.add_vm("a")
    host.add_vm("b")
    host.add_update("slow", "import time; time.sleep(60)", timeout_s=60.0)
    await host.start()
    command = await host.freeze(update="slow", budget_s=20.0)
    await fleet.report(command.operation, "accepted")
    await host.until("a", "frozen")
    await host.until("b", "frozen")
    began = time.monotonic()
    await wait_for(lambda: orphans(command.operation) != [], "the update to run")
    await host.kill()
    await host.until("a", "running", timeout_s=5)
    await host.until("b", "running", timeout_s=5)
    assert time.monotonic() - began < patient(
        10
    )  # far inside the budget of 20 s: at once, not at the deadline
    await host.start()
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "host updater died while VMs were frozen; the pause guard resumed them after" in report.reason
    assert {vm.resumed_by for vm in report.vms} == {"guard"}
    assert all(0 < vm.pause_s < 20 for vm in report.vms)
    for name in ("a", "b"):
        fact = await fleet.ear.one(VmResumed, lambda m, name=name: m.vm == name)
        assert fact.resumed_by == "guard"
    # The half-done update did not outlive the report.
    await wait_for(lambda: not orphans(command.operation), "the orphaned update to end")
    # And the host works again.
    again = await host.freeze(hold_s=0.1, budget_s=5.0)
    assert (await fleet.report(again.operation)).status == "completed"


def orphans(operation: str) -> list[int]:
    """Processes of an update, by the environment it was given."""
    found = []
    for name in Path("/proc").iterdir():
        if name.name.isdigit():
            try:
                environ = (name / "environ").read_bytes()
            except OSError:
                continue
            process = read_process(int(name.name))
            if f"CAESURA_OPERATION={operation}".encode() in environ and process and process.state != "Z":
                found.append(process.pid)
    return found


async def test_updater_and_guard_killed_together(hosts: Callable[..., Any], fleet: Any, freezer: str) -> None:
    host = hosts(freezer=freezer)
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=15.0, budget_s=20.0)
    await host.until("a", "frozen")
    guard = host.guard_pid()
    # The guard is stopped first, so that it cannot act between the two kills.
    os.kill(guard, signal.SIGSTOP)
    os.kill(host.pid, signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    await host.process.wait()
    assert host.kernel("a") == "frozen"
    await host.start()
    await host.until("a", "running")
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    # By its marker, before the new updater has so much as started a guard.
    assert "host updater died during the operation; the VMs were paused for" in report.reason
    assert report.vms[0].pause_s > 0
    assert report.vms[0].resumed_by == "updater"
    assert not list((host.state_dir / "pauses").iterdir())


async def test_updater_stopped_past_the_budget_freezes_nothing_when_it_wakes(
    hosts: Callable[..., Any], fleet: Any, wait_for: Any, tmp_path: Path
) -> None:
    host = hosts()
    host.add_vm("a")
    ran = tmp_path / "ran"
    host.add_update("patch", f"import time; time.sleep(0.3); open({str(ran)!r}, 'a').write('x')")
    await host.start()
    budget_s = min(patient(2.0), 20.0)
    command = await host.freeze(hold_s=budget_s / 2, budget_s=budget_s)
    await host.until("a", "frozen")
    frozen_at = time.monotonic()
    os.kill(host.pid, signal.SIGSTOP)
    await host.until("a", "running", timeout_s=5)
    assert time.monotonic() - frozen_at < budget_s
    # A second command waits in its socket while it sleeps; it is too late for it when it wakes.
    late = await host.freeze(update="patch", budget_s=2.0, not_after=command.not_after.replace(year=2020))
    await wait_for(lambda: time.monotonic() - frozen_at > budget_s + 1, "the budget to be over")
    os.kill(host.pid, signal.SIGCONT)
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "the pause guard resumed VM a: the deadline passed" in report.reason
    assert report.vms[0].resumed_by == "guard"
    assert 0 < report.vms[0].pause_s < budget_s
    assert (await fleet.report(late.operation)).status == "refused"
    assert host.kernel("a") == "running"
    assert not ran.exists()


async def test_updater_stopped_before_the_guard_answers_freezes_nothing(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    # The guard is held while it is asked, so the updater is stopped and woken between arming and freezing.
    host = hosts()
    host.add_vm("a")
    await host.start()
    guard = host.guard_pid()
    os.kill(guard, signal.SIGSTOP)
    command = await host.freeze(hold_s=0.3, budget_s=1.0)
    await fleet.report(command.operation, "accepted")
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert report.reason.startswith("nothing was frozen")
    assert report.vms[0].frozen is False
    os.kill(guard, signal.SIGCONT)
    assert host.kernel("a") == "running"


async def test_guard_killed_while_vms_are_frozen(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    first = host.guard_pid()
    command = await host.freeze(hold_s=15.0, budget_s=20.0)
    await host.until("a", "frozen")
    os.kill(first, signal.SIGKILL)
    await host.until("a", "running", timeout_s=2)
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "the pause guard died" in report.reason
    await fleet.ear.one(HostInventory, lambda m: m.guard == "ready" and m.operation == "")
    again = await host.freeze(hold_s=0.1, budget_s=5.0)
    assert (await fleet.report(again.operation)).status == "completed"
    assert host.guard_pid() != first


async def test_broker_dead_during_the_pause(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=1.0, budget_s=5.0)
    await host.until("a", "frozen")
    frozen_at = time.monotonic()
    await fleet.broker.kill()
    await host.until("a", "running", timeout_s=4)
    assert time.monotonic() - frozen_at < patient(3)
    await host.kill()  # the facts outlive the updater too
    await fleet.broker.restart()
    await host.start()
    report = await fleet.report(command.operation)
    fact = await fleet.ear.one(VmResumed, lambda m: m.operation == command.operation)
    assert fact.pause_s >= 1.0
    assert report.vms[0].pause_s == fact.pause_s
    assert report.status in ("completed", "failed")  # failed if it was killed before it had written the end


async def test_update_that_fails(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("bad", "print('no such package'); raise SystemExit(3)")
    await host.start()
    command = await host.freeze(update="bad")
    report = await fleet.report(command.operation)
    assert (report.status, report.reason) == ("failed", "update bad failed with exit code 3")
    assert report.update is not None
    assert (report.update.exit_code, report.update.output_tail) == (3, "no such package\n")
    assert report.vms[0].frozen
    assert host.kernel("a") == "running"


async def test_output_that_is_to_stay_on_its_host_is_in_the_hosts_log_only(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("secret", "print('pass' + 'word: \\x1b[31mx'); raise SystemExit(3)", output="host")
    host.add_update("open", "print('no such' + ' package'); raise SystemExit(3)")
    await host.start()
    kept = await fleet.report((await host.freeze(update="secret")).operation)
    assert kept.update is not None
    assert "password" not in kept.update.output_tail
    assert "stays on the host" in kept.update.output_tail
    await fleet.report((await host.freeze(update="open")).operation)
    logged = [str(each["output"]) for each in host.log() if each["event"] == "update.failed"]
    assert logged == ["password: \\u001b[31mx\n", "no such package\n"]


async def test_update_that_hangs_and_ignores_sigterm(
    hosts: Callable[..., Any], fleet: Any, wait_for: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("stubborn", IGNORES_TERM, timeout_s=60.0)
    await host.start()
    budget_s = min(patient(2.0), 20.0)
    command = await host.freeze(update="stubborn", budget_s=budget_s)
    await host.until("a", "frozen")
    frozen_at = time.monotonic()
    await host.until("a", "running", timeout_s=4)
    assert time.monotonic() - frozen_at < budget_s
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert report.update is not None
    assert report.update.outcome == "timeout"
    assert report.vms[0].resumed_by == "updater"
    assert report.vms[0].pause_s < budget_s
    await wait_for(lambda: not orphans(command.operation), "the update to be gone")


async def test_vm_that_cannot_be_frozen(hosts: Callable[..., Any], fleet: Any) -> None:
    # Somebody outside sends it SIGCONT all the time, as a debugger or a job control shell might.
    host = hosts(freezer="sigstop")
    host.add_vm("calm")
    host.add_vm("wild")
    await host.start()
    pids = [str(pid) for pid in host.members("wild")]
    racer = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", RACER, *pids, stdout=asyncio.subprocess.PIPE
    )
    assert racer.stdout is not None
    await racer.stdout.readline()
    try:
        command = await host.freeze(hold_s=1.0, budget_s=4.0)
        report = await fleet.report(command.operation)
    finally:
        racer.kill()
        await racer.wait()
    assert report.status == "failed"
    assert "wild" in report.reason
    assert host.kernel("calm") == "running"
    await host.until("wild", "running")


RACER = "import os, signal, sys\nprint('racing', flush=True)\nwhile True:\n    for pid in sys.argv[1:]: os.kill(int(pid), signal.SIGCONT)"


async def test_vm_resumed_by_somebody_else_during_the_update(
    hosts: Callable[..., Any], fleet: Any, wait_for: Any
) -> None:
    host = hosts(freezer="sigstop")
    host.add_vm("a")
    host.add_vm("b")
    host.add_update("slow", "import time; time.sleep(8)")
    await host.start()
    command = await host.freeze(update="slow", budget_s=15.0)
    await wait_for(lambda: orphans(command.operation) != [], "the update to run")
    assert (host.kernel("a"), host.kernel("b")) == ("frozen", "frozen")
    for member in host.members("a"):
        os.kill(member, signal.SIGCONT)
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "VM a ran although it was paused" in report.reason
    assert host.kernel("b") == "running"


async def test_vm_that_cannot_be_resumed_at_first(
    hosts: Callable[..., Any], fleet: Any, wait_for: Any
) -> None:
    # The parent cgroup is frozen too, so thawing the VM's own does not help until somebody thaws the parent.
    host = hosts(freezer="cgroup1")
    host.add_vm("a")
    await host.start()
    parent = Path(host.run_of("a")["control"]).parent.parent / "freezer.state"
    command = await host.freeze(hold_s=0.5, budget_s=2.0)
    await host.until("a", "frozen")
    parent.write_text("FROZEN")
    try:
        await wait_for(
            lambda: any(line["event"] == "vm.not_resumed_yet" for line in host.log()), "a resume that fails"
        )
        assert host.kernel("a") == "frozen"
    finally:
        parent.write_text("THAWED")
    await host.until("a", "running")
    report = await fleet.report(command.operation)
    assert report.vms[0].state == "running"
    assert report.vms[0].pause_s > 0.5


async def test_vm_that_dies_while_frozen(hosts: Callable[..., Any], fleet: Any, wait_for: Any) -> None:
    host = hosts(freezer="cgroup2")
    host.add_vm("dying")
    host.add_vm("other")
    begun = host.folder / "update-began"  # both stand still by then, and the updater knows it
    host.add_update("slow", f"import time; open({str(begun)!r}, 'w').close(); time.sleep(1.5)")
    await host.start()
    command = await host.freeze(update="slow", budget_s=10.0)
    await wait_for(begun.exists, "the update")
    os.kill(host.run_of("dying")["pid"], signal.SIGKILL)
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "VM dying ended while it was paused" in report.reason
    results = {vm.vm: vm for vm in report.vms}
    assert results["dying"].state == "stopped"
    assert results["dying"].error
    assert results["other"].state == "running"
    assert host.kernel("other") == "running"
    assert report.update is not None
    assert report.update.outcome == "succeeded"  # it was let finish: nobody else was harmed by that


async def test_full_disk_is_refused_before_any_vm_is_touched(
    small_disk: Path, hosts: Callable[..., Any], fleet: Any
) -> None:
    # `small_disk` stands first: the host is stopped before its disk is taken away.
    host = hosts()
    host.state_dir = small_disk / "state"
    host.add_vm("a")
    await host.start()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    command = await host.freeze(hold_s=0.2)
    report = await fleet.report(command.operation)
    assert report.status == "refused"
    assert "nothing was touched" in report.reason
    assert "full" in report.reason
    assert report.vms == ()
    filler.unlink()
    # Refused is final for this operation, also after the disk has room again.
    await fleet.say(command, host=host.name)
    again = await host.freeze(hold_s=0.2)
    assert (await fleet.report(again.operation)).status == "completed"
    assert {each.status for each in fleet.reports(command.operation)} == {"refused"}


async def test_stopping_never_leaves_a_vm_paused(hosts: Callable[..., Any], fleet: Any) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    command = await host.freeze(hold_s=15.0, budget_s=20.0)
    await host.until("a", "frozen")
    await host.kill(signal.SIGTERM)
    assert host.process.returncode == 0
    assert host.kernel("a") == "running"
    report = await fleet.report(command.operation)
    assert report.status == "failed"
    assert "stopping" in report.reason


async def test_stopping_lets_an_update_finish(hosts: Callable[..., Any], fleet: Any, wait_for: Any) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("patch", "import time; time.sleep(1.5); print('done')")
    await host.start()
    command = await host.freeze(update="patch")
    await wait_for(lambda: orphans(command.operation) != [], "the update to run")
    await host.kill(signal.SIGTERM)
    report = await fleet.report(command.operation)
    assert report.status == "completed"
    assert host.kernel("a") == "running"


async def test_the_retained_status_of_a_vm_follows_its_pause_and_survives_a_dead_updater(
    hosts: Callable[..., Any], fleet: Any
) -> None:
    host = hosts()
    host.add_vm("a")
    await host.start()
    await fleet.ear.one(VmStatus, lambda m: m.vm == "a" and m.state == "running")
    first = await host.freeze(hold_s=0.5, budget_s=5.0)
    paused = await fleet.ear.one(VmStatus, lambda m: m.state == "paused")
    assert (paused.operation, paused.paused_since is not None) == (first.operation, True)
    fact = await fleet.ear.one(VmResumed)
    ran = await fleet.ear.one(VmStatus, lambda m: m.state == "running" and m.last_pause is not None)
    assert (ran.last_pause.operation, ran.last_pause.pause_s) == (first.operation, fact.pause_s)
    await fleet.report(first.operation)

    # Killed in the middle of a pause: what is retained says "paused" until the next run finds out, and then says how it ended.
    second = await host.freeze(hold_s=20.0, budget_s=25.0)
    await fleet.ear.one(VmStatus, lambda m: m.operation == second.operation)
    await host.kill()
    await host.until("a", "running")
    await host.start()
    after = await fleet.ear.one(
        VmStatus,
        lambda m: (
            m.state == "running" and m.last_pause is not None and m.last_pause.operation == second.operation
        ),
    )
    assert after.last_pause.resumed_by == "guard"
    await fleet.until(lambda: fleet.last(VmStatus) == after)
