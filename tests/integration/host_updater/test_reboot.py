"""An update that needs a reboot, over real processes: shut down, update, started again, and the updater killed in every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from caesura.contract.messages import HostInventory, VmFrozen

ENDS_WHEN_TOLD = """
import os, signal, sys, time
def told(*_):
    open(os.environ["CAESURA_VM"] + ".saved", "a").write("saved\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, told)
os.chdir({folder!r})
open(os.environ["CAESURA_VM"] + ".started", "a").write(f"{{os.getpid()}}\\n")
while True:
    time.sleep(0.01)
"""
IGNORES = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: None)
while not os.path.exists({end!r}):
    time.sleep(0.01)
os.remove({end!r})
"""
PARENT = """
import os, signal, subprocess, sys
os.chdir({folder!r})
child = subprocess.Popen([sys.executable, "-S", "-c", {child!r}])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
child.wait()
"""
CHILD = """
import os, signal, time
def told(*_):
    time.sleep(1)
    open("child.saved", "w").write("saved")
    os._exit(0)
signal.signal(signal.SIGTERM, told)
open("child.started", "w").write("up")
while True:
    time.sleep(0.01)
"""


def lines(path: Path) -> list[str]:
    """Of a file that may not be there."""
    return path.read_text().splitlines() if path.exists() else []


def host_with(hosts: Callable[..., Any], tmp_path: Path, *vms: str, code: str = "pass", **update: Any) -> Any:
    """A host whose VMs save something when they are told to end."""
    host = hosts()
    for name in vms:
        host.add_vm(name, code=ENDS_WHEN_TOLD.format(folder=str(tmp_path)))
    host.add_update("kernel", code, impact="reboot", **update)
    return host


async def up(host: Any, tmp_path: Path, wait_for: Any) -> None:
    """Start it, and wait until its workloads can be told to end."""
    await host.start()
    saving = [vm["name"] for vm in host.vms if "CAESURA_VM" in vm["code"]]
    for name in saving:
        await wait_for(lambda name=name: lines(tmp_path / f"{name}.started"), f"workload of {name}")


async def reboot(host: Any) -> Any:
    """The command."""
    return await host.freeze(method="reboot", update="kernel")


async def test_every_vm_shuts_down_by_itself_and_runs_again_after_the_update(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    seen, run_files = tmp_path / "seen", str(tmp_path / "host-1" / "state" / "vms" / "*.run.json")
    code = (
        "import glob, json, os\n"
        f"pids = [json.load(open(name))['pid'] for name in glob.glob({run_files!r})]\n"
        f"open({str(seen)!r}, 'w').write(str([os.path.exists(f'/proc/{{pid}}') for pid in pids]))"
    )
    host = host_with(hosts, tmp_path, "a", "b", code=code)
    await up(host, tmp_path, wait_for)
    before = {vm: host.run_of(vm)["pid"] for vm in ("a", "b")}
    command = await reboot(host)
    report = await fleet.report(command.operation)
    assert report.status == "completed", report
    assert seen.read_text() == "[False, False]", "the update ran while a VM was up"
    for vm in report.vms:
        assert (vm.state, vm.frozen, vm.pause_s, vm.memory) == ("running", False, 0.0, None)
        assert vm.detail.startswith("shut down by SIGTERM, up again ")
        assert host.run_of(vm.vm)["pid"] != before[vm.vm]
        assert lines(tmp_path / f"{vm.vm}.saved") == ["saved"]
        await host.until(vm.vm, "running")
    assert fleet.ear.all(VmFrozen) == []
    assert not list((host.state_dir / "vms").glob("*.shutdown"))


async def test_a_vm_that_does_not_shut_down_stops_the_update_and_nothing_is_killed(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    ran, end = tmp_path / "ran", tmp_path / "end"
    host = host_with(hosts, tmp_path, "a", code=f"open({str(ran)!r}, 'w')", shutdown_s=1.5)
    host.add_vm("stubborn", code=IGNORES.format(end=str(end)))
    await up(host, tmp_path, wait_for)
    before = {vm: host.run_of(vm)["pid"] for vm in ("a", "stubborn")}
    report = await fleet.report((await reboot(host)).operation)
    assert (report.status, report.codes) == ("failed", ("shutdown_failed",)), report
    assert "VM stubborn did not shut down" in report.reason
    assert report.update is not None
    assert report.update.outcome == "not_run"
    assert not ran.exists()
    assert {vm.vm: vm.state for vm in report.vms} == {"a": "running", "stubborn": "running"}
    assert host.run_of("stubborn")["pid"] == before["stubborn"]
    assert host.run_of("a")["pid"] != before["a"], "it was started again"
    # It obeys after all, when nobody waits for it any more: at the end every VM runs.
    end.touch()
    log = "vm.ended_late"
    await wait_for(lambda: any(line["event"] == log for line in host.log()), "its late end")
    await wait_for(lambda: [*(host.state_dir / "vms").glob("*.shutdown")] == [], "stubborn started again")
    assert host.run_of("stubborn")["pid"] != before["stubborn"]
    await host.until("stubborn", "running")


async def test_a_vm_that_does_not_shut_down_is_killed_where_the_update_says_so(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    host = host_with(hosts, tmp_path, "a", code=code, shutdown_s=1.5, kill_after_timeout=True)
    host.add_vm("stubborn", code=IGNORES.format(end=str(tmp_path / "never")))
    await up(host, tmp_path, wait_for)
    before = {vm: host.run_of(vm)["pid"] for vm in ("a", "stubborn")}
    report = await fleet.report((await reboot(host)).operation)
    assert report.status == "completed", report
    assert ran.exists()
    details = {vm.vm: vm.detail for vm in report.vms}
    assert details["stubborn"].startswith("killed, since it had not shut down after 1.5 s, up again")
    assert details["a"].startswith("shut down by SIGTERM, ")
    assert lines(tmp_path / "a.saved") == ["saved"]
    for vm, pid in before.items():
        await host.until(vm, "running")
        assert host.run_of(vm)["pid"] != pid
    assert "vm.killed" in {line["event"] for line in host.log()}
    assert not list((host.state_dir / "vms").glob("*.shutdown"))


async def test_an_update_that_fails_still_has_every_vm_started(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    host = host_with(hosts, tmp_path, "a", "b", code="raise SystemExit(3)")
    await up(host, tmp_path, wait_for)
    report = await fleet.report((await reboot(host)).operation)
    assert (report.status, report.codes) == ("failed", ("update_failed",))
    assert {vm.state for vm in report.vms} == {"running"}
    await wait_for(lambda: len(lines(tmp_path / "a.started")) == 2, "a started again")


async def test_a_child_that_outlives_its_parent_has_its_time_to_end(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    host = host_with(hosts, tmp_path)
    host.add_vm("a", code=PARENT.format(folder=str(tmp_path), child=CHILD))
    await up(host, tmp_path, wait_for)
    await wait_for((tmp_path / "child.started").exists, "the child")
    report = await fleet.report((await reboot(host)).operation)
    assert report.status == "completed", report
    assert (tmp_path / "child.saved").read_text() == "saved"


async def test_an_abort_during_the_update_has_the_vms_started_and_the_update_ended(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    ran = tmp_path / "ran"
    code = f"import time; open({str(ran)!r}, 'w'); time.sleep(60)"
    host = host_with(hosts, tmp_path, "a", code=code, timeout_s=90.0)
    await up(host, tmp_path, wait_for)
    command = await reboot(host)
    await wait_for(ran.exists, "the update")
    assert host.kernel("a") == "gone"
    await host.abort(command.operation)
    report = await fleet.report(command.operation)
    assert (report.status, report.codes) == ("failed", ("aborted",))
    assert [vm.state for vm in report.vms] == ["running"]


async def test_an_updater_killed_while_a_vm_shuts_down_starts_it_in_its_next_life(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    end = tmp_path / "end"
    host = host_with(hosts, tmp_path, "a", shutdown_s=30.0)
    host.add_vm("slow", code=IGNORES.format(end=str(end)))
    await up(host, tmp_path, wait_for)
    before = host.run_of("slow")["pid"]
    command = await reboot(host)
    await wait_for(lambda: lines(tmp_path / "a.saved") == ["saved"], "a shut down")
    await wait_for((host.state_dir / "vms" / "slow.shutdown").exists, "slow is asked, too")
    await host.kill()
    await host.start()
    end.touch()
    report = await fleet.report(command.operation)
    assert (report.status, report.codes) == ("failed", ("updater_died",)), report
    assert "every VM that was shut down was started again, and the update did not run" in report.reason
    assert {vm.state for vm in report.vms} == {"running"}
    assert host.run_of("slow")["pid"] != before
    await wait_for(lambda: len(lines(tmp_path / "a.started")) == 2, "a started again")


async def test_an_updater_killed_while_its_vms_are_down_starts_them_in_its_next_life(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    ran = tmp_path / "ran"
    code = f"import time; open({str(ran)!r}, 'w'); time.sleep(60)"
    host = host_with(hosts, tmp_path, "a", "b", code=code, timeout_s=90.0)
    await up(host, tmp_path, wait_for)
    command = await reboot(host)
    await wait_for(ran.exists, "the update")
    await host.kill()
    assert (host.kernel("a"), host.kernel("b")) == ("gone", "gone")
    await host.start()
    report = await fleet.report(command.operation)
    assert (report.status, report.codes) == ("failed", ("updater_died",)), report
    assert "the update may be half complete" in report.reason
    assert report.update is not None
    assert report.update.outcome == "interrupted"
    assert {vm.state for vm in report.vms} == {"running"}
    for vm in ("a", "b"):
        await host.until(vm, "running")
        assert lines(tmp_path / f"{vm}.saved") == ["saved"]


async def test_what_a_host_offers_and_what_it_refuses(
    hosts: Callable[..., Any], fleet: Any, tmp_path: Path, wait_for: Any
) -> None:
    host = host_with(hosts, tmp_path, "a", "b", shutdown_s=7.0)
    await up(host, tmp_path, wait_for)
    inventory = fleet.last(HostInventory)
    assert all("reboot" in vm.methods for vm in inventory.vms)
    assert [each.shutdown_s for each in inventory.updates] == [7.0]
    command = await host.freeze("a", method="reboot", update="kernel")
    report = await fleet.report(command.operation)
    assert (report.status, report.codes) == ("refused", ("command_invalid",))
    assert "leaves out b" in report.reason
    assert lines(tmp_path / "a.saved") == []
