"""What an engine's answers and a container's cgroup mean; and the driver's part of a host file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from caesura_host_updater.drivers import remote_pauses
from caesura_host_updater.drivers.container import driver as module
from caesura_host_updater.drivers.container import pausing
from caesura_host_updater.drivers.container.cgroup import NoFreezer, freezer_of
from caesura_host_updater.drivers.container.definition import (
    ContainerOptions,
    ContainerVm,
    Inspected,
    engine_facts,
    inspected,
    vms_of,
)
from caesura_host_updater.drivers.container.driver import ContainerDriver
from caesura_host_updater.drivers.port import FreezeFailed
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file
from caesura_vmcontrol.container_engine import EnginePlan, EngineSilent

V1 = "30 20 0:26 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n"
V2 = "31 20 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
BOTH = V1 + "31 20 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "cgroup", "wanted"),
    [
        (V1, "7:freezer:/docker/ab\n", ("cgroup1", "/sys/fs/cgroup/freezer/docker/ab/freezer.state")),
        (BOTH, "7:freezer:/docker/ab\n0::/\n", ("cgroup1", "/sys/fs/cgroup/freezer/docker/ab/freezer.state")),
        (
            V2,
            "0::/system.slice/docker-ab.scope\n",
            ("cgroup2", "/sys/fs/cgroup/system.slice/docker-ab.scope/cgroup.freeze"),
        ),
        # Podman: one group for the container, and conmon's beside it.
        (
            BOTH,
            "7:freezer:/\n0::/machine.slice/libpod-ab.scope\n",
            ("cgroup2", "/sys/fs/cgroup/unified/machine.slice/libpod-ab.scope/cgroup.freeze"),
        ),
    ],
)
def test_where_a_container_is_frozen(mounts: str, cgroup: str, wanted: tuple[str, str]) -> None:
    assert freezer_of(4711, mounts, cgroup) == wanted


@pytest.mark.parametrize(
    "cgroup", ["0::/\n", "7:freezer:/\n0::/\n", "0::/../../x\n", "", "7:freezer:/docker/ab\n"]
)
def test_a_cgroup_that_cannot_be_seen_or_frozen_is_named(cgroup: str) -> None:
    with pytest.raises(NoFreezer, match="process 4711 is in no cgroup of its own"):
        freezer_of(4711, V2, cgroup)


def test_what_an_engine_says_of_a_container() -> None:
    state = {"Running": True, "Paused": True, "Pid": 7, "ExitCode": 0, "Status": "paused"}
    assert inspected({"Id": "ab", "State": state}) == Inspected(
        container="ab", running=True, paused=True, pid=7, exit_code=0, status="paused"
    )
    answers: tuple[Any, ...] = (
        None,
        [],
        {},
        {"Id": "ab"},
        {"Id": "ab", "State": {"Running": True}},
        {"Id": 1, "State": 2},
    )
    for strange in answers:
        with pytest.raises(ValueError, match="something else than a container"):
            inspected(strange)


@pytest.mark.parametrize(
    ("version", "info", "name", "survives"),
    [
        (
            {"Version": "28.2.2", "Components": [{"Name": "Engine"}]},
            {"LiveRestoreEnabled": True},
            "Docker",
            True,
        ),
        ({"Version": "28.2.2"}, {"LiveRestoreEnabled": False}, "Docker", False),
        ({"Version": "28.2.2"}, None, "Docker", False),
        ({"Version": "4.3.1", "Components": [{"Name": "Podman Engine"}]}, {}, "Podman", True),
        (None, None, "Docker", False),
    ],
)
def test_whether_containers_outlive_their_engine(version: Any, info: Any, name: str, survives: bool) -> None:
    facts = engine_facts(version, info)
    assert (facts.name, facts.survives) == (name, survives)


def container(name: str, **labels: str) -> dict[str, Any]:
    """One of the list."""
    return {
        "Id": "ab",
        "Names": [f"/{name}"],
        "Labels": {key.replace("__", "."): value for key, value in labels.items()},
    }


def test_labels_say_what_is_a_vm() -> None:
    of = "com__docker__compose__project"
    answer = [
        container("shop-web-1", caesura__set="web", caesura__update_domain="0", **{of: "shop"}),
        container("shop-web-2", caesura__set="web", caesura__update_domain="x", **{of: "shop"}),
        container("shop-web-3", caesura__vm="shop-web-1", caesura__update_domain="0", **{of: "shop"}),
        container("alone", caesura__update_domain="3", caesura__agent="true"),
        container("known", caesura__update_domain="0"),
        container("nothing"),
    ]
    found, passed = vms_of(answer, "", {"known"})
    assert [(vm.name, vm.set, vm.update_domain, vm.agent, vm.found) for vm in found] == [
        ("shop-web-1", "web", 0, False, True),
        ("alone", "", None, True, True),
    ]
    assert passed["shop-web-2"].startswith("its labels cannot be used")
    assert passed["shop-web-3"] == "VM shop-web-1 is container shop-web-1 already"
    assert [vm.name for vm in vms_of(answer, "shop", set())[0]] == ["shop-web-1"]
    assert vms_of(None, "", set()) == ((), {})


def test_the_host_file() -> None:
    file = parse_host_file(
        'host = "h"\ndriver = "container"\n[container]\nsocket = "/run/podman/podman.sock"\n'
        '[[vm]]\nname = "web-1"\nset = "web"\nupdate_domain = 0\n[vm.container]\nname = "shop.web_1"\n[[vm]]\nname = "b"\n',
        "host.toml",
    )
    first, second = file.vm
    assert isinstance(first, ContainerVm)
    assert isinstance(second, ContainerVm)
    assert (first.container_name, second.container_name, first.agent) == ("shop.web_1", "b", False)
    assert file.options.socket == "/run/podman/podman.sock"
    for wrong, why in (
        ('[container]\nsocket = "docker.sock"', "socket"),
        ('[[vm]]\nname = "a"\n[vm.container]\nname = "a/b"', "name"),
        ('[[vm]]\nname = "a"\nfound = true', "not for the host file"),
        ('[[vm]]\nname = "a"\n[[vm.process]]\nargv = ["x"]', "takes \\[vm.container\\]"),
    ):
        with pytest.raises(HostFileError, match=why):
            parse_host_file(f'host = "h"\ndriver = "container"\n{wrong}', "host.toml")


class World:
    """An engine and a kernel that are made up: what the driver calls, and what happens to the one container."""

    def __init__(self, driver: ContainerDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = "running"
        self.silent = False
        self.resumed = 0
        plan = EnginePlan("a", "/s", "0a" * 32, 4711, 1, "cgroup2", "/sys/fs/cgroup/x/cgroup.freeze")
        driver._runs["a"] = plan
        monkeypatch.setattr(driver, "_call", self._call)
        for each in (module, pausing, remote_pauses):
            monkeypatch.setattr(each, "condition", lambda _: self.state)
        for each in (module, remote_pauses):
            monkeypatch.setattr(each, "resume_vm", self._thaw)

    def _call(self, method: str, container: str, what: str, timeout_s: float) -> Any:
        assert timeout_s > 0
        if what == "/json":
            return {"Id": container, "State": {"Running": True, "Paused": False, "Pid": 4711}}
        assert (method, what) == ("POST", "/pause")
        if self.silent:
            raise EngineSilent("does not answer")
        self.state = "frozen"
        return None

    def _thaw(self, _: object) -> None:
        self.resumed += 1
        self.state = "running"


def test_an_engine_whose_containers_end_with_it_is_a_risk_that_is_named(tmp_path: Path) -> None:
    driver = ContainerDriver((ContainerVm(name="a"),), ContainerOptions(), tmp_path)
    driver._engine_error, driver._engine = (
        "",
        engine_facts({"Version": "28.2.2"}, {"LiveRestoreEnabled": False}),
    )
    assert driver.capabilities("a").pause_risk.startswith("live-restore is off")
    assert "live-restore is off" in driver.detail()
    driver._engine = engine_facts({"Version": "28.2.2"}, {"LiveRestoreEnabled": True})
    assert driver.capabilities("a").pause_risk == ""
    assert driver.detail() == "Docker 28.2.2"


async def test_a_pause_of_ours_that_came_late_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ContainerDriver((ContainerVm(name="a"),), ContainerOptions(), tmp_path)
    world = World(driver, monkeypatch)
    world.silent = True
    with pytest.raises(FreezeFailed, match="does not answer"):
        await driver.freeze("a", time.monotonic() + 5)
    world.state = "frozen"
    monkeypatch.setattr(module, "pause_container", _found_paused)
    with pytest.raises(FreezeFailed, match="came late"):
        await driver.freeze("a", time.monotonic() + 5)
    assert (driver.why_left("a"), await driver.resume("a", 5)) == ("", "running")


async def test_a_late_pause_that_was_ended_by_the_operation_is_expected_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ContainerDriver((ContainerVm(name="a"),), ContainerOptions(), tmp_path)
    world = World(driver, monkeypatch)
    driver._late.expect(driver._runs["a"])
    assert await driver.resume("a", 5) == "running"
    assert "a" in driver._late, "it may come yet"
    world.state = "frozen"
    assert await driver.resume("a", 5) == "running"
    assert "a" not in driver._late


async def test_a_container_that_cannot_be_looked_at_is_resumed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ContainerDriver((ContainerVm(name="a"),), ContainerOptions(), tmp_path)
    world = World(driver, monkeypatch)
    world.state = "frozen"

    def look(_: object) -> str:
        if world.state == "frozen":
            raise PermissionError("nobody says")
        return world.state

    monkeypatch.setattr(module, "condition", look)
    assert await driver.resume("a", 5) == "running"
    assert world.resumed == 1


def _found_paused(*_: object) -> None:
    raise pausing.PausedBefore("it is paused")


async def test_a_pause_that_comes_late_is_undone_and_one_of_ours_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ContainerDriver((ContainerVm(name="a"),), ContainerOptions(), tmp_path)
    world = World(driver, monkeypatch)
    world.silent = True
    with pytest.raises(FreezeFailed, match="does not answer"):
        await driver.freeze("a", time.monotonic() + 5)
    await driver._late.undo()
    assert (world.state, world.resumed) == ("running", 0)
    world.state = "frozen"
    await driver._late.undo()
    assert (world.state, world.resumed) == ("running", 1)
    # The next pause is ours: it stays until we resume it, though the engine is still watched for a late one.
    world.silent = False
    await driver.freeze("a", time.monotonic() + 5)
    await driver._late.undo()
    assert (world.state, world.resumed) == ("frozen", 1)
    assert await driver.resume("a", 5) == "running"
