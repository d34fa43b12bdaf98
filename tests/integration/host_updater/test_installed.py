"""A host remembers which updates it has, across its own end, and says so in its inventory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from caesura.contract.messages import HostInventory


async def test_what_succeeded_is_remembered_when_the_updater_is_killed_and_what_failed_is_not(
    hosts: Callable[..., Any],
) -> None:
    host = hosts()
    host.add_vm("a")
    host.add_update("good", "", version="1.2")
    host.add_update("bad", "raise SystemExit(3)", version="1")
    await host.start()

    def has(inventory: HostInventory) -> set[tuple[str, str]]:
        return {(each.update, each.version) for each in inventory.installed}

    done = await host.freeze(update="good")
    assert (await host.fleet.report(done.operation)).status == "completed"
    failed = await host.freeze(update="bad")
    assert (await host.fleet.report(failed.operation)).status == "failed"
    await host.fleet.until(lambda: has(host.fleet.last(HostInventory)) == {("good", "1.2")})
    await host.kill()
    await host.start()
    await host.fleet.until(lambda: has(host.fleet.last(HostInventory)) == {("good", "1.2")})
    assert host.fleet.last(HostInventory).installed[0].at is not None


async def test_an_updates_own_command_says_that_it_was_rolled_back(
    hosts: Callable[..., Any],
) -> None:
    host = hosts()
    host.add_vm("a")
    package = host.folder / "package"
    question = [sys.executable, "-S", "-c", f"open({str(package)!r})"]
    host.add_update("patch", f"open({str(package)!r}, 'w').close()", installed=question)
    await host.start()
    done = await host.freeze(update="patch")
    assert (await host.fleet.report(done.operation)).status == "completed"
    await host.fleet.until(lambda: bool(host.fleet.last(HostInventory).installed))
    package.unlink()
    # It is asked again in a while, and at once when a file in updates.d changed.
    path = host.updates_dir / "patch.toml"
    path.write_text(path.read_text() + f"\ndescription = {json.dumps('again')}\n")
    await host.fleet.until(lambda: not host.fleet.last(HostInventory).installed)
