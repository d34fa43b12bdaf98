"""What happens to a guest's memory in a pause is found, through all services: planned, shown, judged (I3)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caesura_testing.sandbox import Vm

pytestmark = pytest.mark.e2e

_PAGES = "1048576"
"""Bytes of canary in these tests: fewer than an agent's own, so that it is filled at once."""

_DAMAGE_CANARY = """
import re, sys
from pathlib import Path

page = 4096
done = 0
for process in Path("/proc").iterdir():
    if not process.name.isdigit():
        continue
    try:
        # Those of this test only: others may run beside it, with VMs of the same name.
        wanted = {b"CAESURA_VM_AGENT_VM=" + sys.argv[1].encode(), sys.argv[2].encode()}
        if not wanted <= set((process / "environ").read_bytes().split(b"\\0")):
            continue
        maps = (process / "maps").read_text()
        with (process / "mem").open("r+b", buffering=0) as memory:
            for line in maps.splitlines():
                found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                begin, end = (int(each, 16) for each in found.groups()) if found else (0, 0)
                if not 0 < end - begin <= 64 << 20:
                    continue
                memory.seek(begin)
                data = memory.read(end - begin)
                places = [at for at in range(0, len(data), page) if data[at : at + 8] == b"CAESURAc"]
                for at in places[5:7]:
                    memory.seek(begin + at + 2000)
                    memory.write(bytes([data[at + 2000] ^ 4]))
                    done += 1
    except OSError:
        continue
print("damaged", done)
sys.exit(0 if done else 5)
"""

_DAMAGE_FILE = """
import sys
with open(sys.argv[1], "r+b") as file:
    file.seek(8192)
    file.write(b"x")
"""


def _vms(**changes: Any) -> list[Vm]:
    return [Vm(name="web-1", set="web", agent_settings={"canary_bytes": _PAGES}, **changes)]


async def _canary_planned(stage: Any, vm: str) -> None:
    """The host has received that the agent holds its canary."""

    def there() -> bool:
        records = {each.vm: each for host in stage.fleet_view.hosts.values() for each in host.vms}
        return vm in records and "canary_equal" in (records[vm].proofs or {}).get("freeze", ())

    await stage.sandbox.until(there, 30, "the canary in the inventory")


def _shown(stage: Any, vm: str) -> tuple[set[str], set[str]]:
    """What host and guest showed of the VM's last pause: held and broken."""
    proofs = [each.memory for each in stage.fleet_view.pauses.values() if each.vm == vm]
    proofs += [each.memory for each in stage.fleet_view.clocks.values() if each.vm == vm and each.operation]
    known = [each for each in proofs if each is not None]
    return {code for each in known for code in each.held}, {code for each in known for code in each.broken}


async def test_a_whole_guest_shows_digest_canary_and_boot_id(stages: Callable[..., Any]) -> None:
    stage = await stages(host_1=_vms())
    await _canary_planned(stage, "web-1")
    state = await stage.ended(await stage.roll(on_unproven="halt"))
    assert state.status == "completed", state.reason
    assert _shown(stage, "web-1") == (
        {"digest_equal", "sampled_digest_equal", "canary_equal", "not_rebooted"},
        set(),
    )


@pytest.mark.parametrize("policy", ["halt", "proceed"])
async def test_two_bits_of_a_guests_own_memory_changed_in_the_pause_halt_whatever_the_policy(
    policy: str, stages: Callable[..., Any]
) -> None:
    """The memory file is whole and the boot id is equal: this completed, and was said to be "memory same"."""
    stage = await stages(up=False)
    script = stage.sandbox.folder / "damage.py"
    script.write_text(_DAMAGE_CANARY)
    stage.sandbox.update("damage", [sys.executable, str(script), "web-1", stage.sandbox.mark])
    stage.sandbox.host("host-1", *_vms())
    await stage.up("host-1")
    await _canary_planned(stage, "web-1")
    state = await stage.ended(await stage.roll("damage", on_unproven=policy))
    assert state.status == "halted"
    assert "(canary differs)" in state.reason
    assert "2 of 256 pages" in state.reason
    held, broken = _shown(stage, "web-1")
    assert broken == {"canary_equal"}
    assert held >= {"digest_equal", "not_rebooted"}
    await stage.none_frozen()


async def test_a_byte_of_memory_above_the_limit_of_digests_is_found_by_its_sample(
    stages: Callable[..., Any],
) -> None:
    """Above the limit nothing was read at all."""
    stage = await stages(up=False)
    stage.sandbox.host("host-1", *_vms(ram_bytes=100 * 4096), max_digest_bytes="4096")
    ram = Path(stage.sandbox.folder) / "host-1" / "vms" / "web-1.ram"
    script = stage.sandbox.folder / "damage.py"
    script.write_text(_DAMAGE_FILE)
    stage.sandbox.update("damage", [sys.executable, str(script), str(ram)])
    await stage.up("host-1")
    whole = await stage.ended(await stage.roll(on_unproven="halt"))
    assert whole.status == "completed", whole.reason
    assert "sampled_digest_equal" in _shown(stage, "web-1")[0]
    assert "digest_equal" not in _shown(stage, "web-1")[0]
    state = await stage.ended(await stage.roll("damage"))
    assert state.status == "halted"
    assert "the memory of VM web-1 changed while it was paused" in state.reason
    assert _shown(stage, "web-1")[1] == {"sampled_digest_equal"}


async def test_a_vm_of_which_nothing_can_be_shown_is_refused_or_let_through_as_the_policy_says(
    stages: Callable[..., Any],
) -> None:
    bare = [Vm(name="web-1", set="web", agent=False, run_agent=False, ram_bytes=0)]
    stage = await stages(host_1=bare)
    with pytest.raises(
        AssertionError, match="web-1: no proof can be made that freeze leaves its memory as it is"
    ) as caught:
        await stage.roll(on_unproven="halt", on_unsynced="proceed")
    assert "has no memory file (ram_bytes)" in str(caught.value)
    assert not stage.sandbox.watch.pauses
    state = await stage.ended(await stage.roll(on_unsynced="proceed"))
    assert state.status == "completed", state.reason
    assert _shown(stage, "web-1") == (set(), set())


async def test_a_proof_that_was_planned_and_not_made_halts(stages: Callable[..., Any]) -> None:
    """Only the canary could show anything, and the agent dies in the pause."""
    stage = await stages(up=False)
    vms = _vms(ram_bytes=0)
    stage.sandbox.host("host-1", *vms, clock_timeout_s="2")
    victim = stage.sandbox.folder / "victim"
    stage.sandbox.update("kill-agent", ["sh", "-c", f"kill -KILL $(cat {victim})"])
    await stage.up("host-1")
    await _canary_planned(stage, "web-1")
    victim.write_text(str(stage.sandbox.agent_pid("web-1")))
    state = await stage.ended(
        await stage.roll("kill-agent", on_unproven="halt", on_unsynced="proceed", verify_timeout_s=10.0),
        timeout_s=90.0,
    )
    assert state.status == "halted"
    await stage.none_frozen()
    assert "canary_equal" not in _shown(stage, "web-1")[0]
    assert "unproven" in state.reason or "rebooted" in state.reason, state.reason
