"""Drivers as plug-ins: how they are found, what of the host file is theirs, and which are refused, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import pytest

from caesura.runtime.errors import ConfigError
from caesura_host_updater.drivers.plugin import (
    GROUP,
    DriverSetup,
    DriverUnusable,
    check_plans,
    installed_drivers,
    load_plugin,
)
from caesura_host_updater.drivers.port import DriverError
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file, with_discovered
from caesura_testing.example_driver import ExampleDriver, ExampleOptions, ExampleVm
from caesura_testing.plugins import install_driver
from caesura_vmcontrol.resume_plans import (
    MECHANISMS,
    CgroupPlan,
    ResumePlan,
    SignalPlan,
    mechanism_of,
    plan_from_json,
)

EXAMPLE = "caesura_testing.example_driver:ExamplePlugin"
VM = '[[vm]]\nname = "a"\nset = "web"\nupdate_domain = 1\n'
FILE = f'host = "h"\ndriver = "example"\n{VM}[vm.example]\nargv = ["sleep", "1"]\n'
WITHOUT = 'host = "h"\n[[vm]]\nname = "b"\n[[vm.process]]\nargv = ["true"]\n'

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a driver: an entry point, and if ``code`` is given the module that it names."""

    def install(name: str, target: str, code: str = "", *, package: str = "") -> None:
        folder = install_driver(tmp_path / f"site-{package or name}", name, target, package=package)
        if code:
            (folder / f"{target.partition(':')[0]}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)

    return install


def test_ours_are_installed_and_each_can_be_loaded() -> None:
    assert installed_drivers() == ("container", "libvirt", "process", "proxmox", "qemu")
    for name in installed_drivers():
        plugin = load_plugin(name)
        assert plugin.name == name
        assert plugin.mechanisms <= set(MECHANISMS)


def test_every_plan_of_the_guard_has_a_mechanism_and_nothing_else_has() -> None:
    assert {kind.__name__ for kind in get_args(ResumePlan)} == {
        "CgroupPlan", "SignalPlan", "EnginePlan", "LibvirtPlan", "QemuPlan", "SwapPlan", "ReplacePlan",
    }  # fmt: skip
    vmm = {"pid": 2, "start_ticks": 1, "qmp": "/q"}
    swap = {"vm": "a", "kind": "swap", "old": vmm, "new": {**vmm, "pid": 3}, "claims": "/c"}
    replace = {
        "vm": "a", "kind": "replace", "old": vmm, "claims": "/c", "state_file": "/s", "qmp": "/q2", "mark": "M=1", "log": "/l",
        "argv": [["/qemu", "-incoming", "defer", "-S"]], "environ": [["M", "1"]], "ram": None, "beside": False,
    }  # fmt: skip
    found = [
        mechanism_of(plan_from_json(each))
        for each in ({"vm": "a", "kind": "qemu", "vmm": vmm}, swap, replace)
    ]
    found += [mechanism_of(SignalPlan("a", 2, 1))]
    found += [mechanism_of(CgroupPlan("a", "cgroup2", "/sys/fs/cgroup/x/cgroup.freeze"))]
    engine = {
        "vm": "a", "kind": "engine", "socket": "/s", "container": "0a" * 32, "pid": 2, "start_ticks": 1, "freezer": "cgroup2",
        "control": "/sys/fs/cgroup/x/cgroup.freeze",
    }  # fmt: skip
    found += [mechanism_of(plan_from_json(engine))]
    libvirt = {
        "vm": "a", "kind": "libvirt", "socket": "/s", "uri": "qemu:///system", "uuid": "783136f9-2b12-4ee3-8a40-5eee38a7cccd",
        "number": 1, "pid": 2, "start_ticks": 1, "qmp": ["/q"],
    }  # fmt: skip
    found += [mechanism_of(plan_from_json(libvirt))]
    assert found == ["qmp", "qmp", "qmp", "signal", "cgroup", "engine", "libvirt"]
    assert set(found) == set(MECHANISMS)
    assert mechanism_of({"vm": "a", "kind": "signal"}) is None


async def test_a_plug_in_reads_its_part_of_the_host_file_and_makes_its_driver(
    install: Install, tmp_path: Path
) -> None:
    install("example", EXAMPLE)
    assert installed_drivers() == ("container", "example", "libvirt", "process", "proxmox", "qemu")
    file = parse_host_file(f"{FILE}[example]\nstop_s = 3\n", "host.toml")
    (vm,) = file.vm
    assert isinstance(vm, ExampleVm)
    assert vm.example is not None
    assert (vm.example.argv, vm.set_name, vm.domain) == (("sleep", "1"), "web", 1)
    assert file.options == ExampleOptions(stop_s=3.0)
    assert with_discovered(file) == (file, {})
    setup: DriverSetup[Any, Any] = DriverSetup(
        host=file.host,
        vms=file.vm,
        options=file.options,
        state_dir=tmp_path,
        environ=os.environ,
        max_digest_bytes=0,
    )
    driver = await load_plugin(file.driver).build(setup)
    await driver.open()
    try:
        assert await driver.read_states() == {"a": "running"}
        check_plans(driver, ["a"])
    finally:
        await driver.close(stop_vms=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (FILE.replace("[vm.example]", "[vm.exemple]"), "unknown field `exemple` - at `$.vm[0]`"),
        (FILE.replace("argv", "arg"), "unknown field `arg` - at `$.vm[0].example`"),
        (FILE + "[example]\nstop = 1\n", "unknown field `stop` - at `$.example`"),
        (FILE + "[example]\nstop_s = 0\n", "> 0.0 - at `$.example.stop_s`"),
        (f'host = "h"\ndriver = "example"\n{VM}', "VM 'a' has no [vm.example]: give it an argv"),
        (
            FILE + '[[vm.process]]\nargv = ["x"]\n',
            "VM 'a' has a [[vm.process]] or ram_bytes, but the host's driver is 'example': say driver = \"process\"",
        ),
        (FILE + '[[vm.process]]\nargs = ["x"]\n', "unknown field `args` - at `$.vm[0].process[0]`"),
        (
            FILE.replace('driver = "example"\n', ""),
            "VM 'a' has a [vm.example], but the host's driver is 'process': say driver = \"example\"",
        ),
        (
            FILE.replace('"example"', '"exemple"'),
            "there is no driver 'exemple': write 'container', 'example', 'libvirt', 'process', 'proxmox' or 'qemu' - at `$.driver`",
        ),
    ],
)
def test_bad_host_files_of_a_plug_in_are_named(install: Install, text: str, why: str) -> None:
    install("example", EXAMPLE)
    with pytest.raises(HostFileError, match=r"^host\.toml: ") as caught:
        parse_host_file(text, "host.toml")
    assert why in str(caught.value)


def test_a_file_may_have_the_table_of_another_driver() -> None:
    file = parse_host_file(f'{WITHOUT}[qemu]\naccel = "kvm"\n[process]\nfreezer = "sigstop"\n', "host.toml")
    assert file.options.freezer == "sigstop"


def test_what_a_vm_does_not_have_of_another_driver_is_not_held_against_it(install: Install) -> None:
    name = f"good_{uuid4().hex}"
    vms = "class Vm(ExampleVm, kw_only=True, frozen=True):\n ports: list[int] = []\n"
    install("good", f"{name}:Good", f"{_HEAD}{vms}class Good(ExamplePlugin):\n name = 'good'\n vm_type = Vm")
    for ports in ("", "ports = []\n"):
        text = WITHOUT.replace("[[vm.p", f"{ports}[[vm.p")
        assert parse_host_file(f"{text}[good]\n", "host.toml").vm
    with pytest.raises(HostFileError, match=r"VM 'b' has a \[vm.example\], but .*: say driver = \"good\""):
        parse_host_file(WITHOUT.replace("[[vm.p", "ports = [1]\n[[vm.p"), "host.toml")


_HEAD = """
from caesura_testing.example_driver import ExampleOptions, ExamplePlugin, ExampleVm
from caesura_host_updater.drivers.plugin import DriverPlugin
import msgspec
"""
_VM = """
class Vm(ExampleVm, kw_only=True, frozen=True):
    {}

class Bad(ExamplePlugin):
    name = 'bad'
    vm_type = Vm
"""
_HTTP = (
    "it has VMs resumed by 'http'; the pause guard, which resumes VMs when the host updater is dead, "
    "knows 'signal', 'cgroup', 'qmp', 'engine', 'libvirt'"
)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "",
            "cannot be loaded: ModuleNotFoundError: No module named 'bad_",
        ),
        (
            "import no_such_library",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("Other = 1", "cannot be loaded: AttributeError"),
        ("Bad = 1", "not a DriverPlugin"),
        ("class Bad: pass", "not a DriverPlugin"),
        ("class Bad(DriverPlugin): name = 'bad'", "cannot be used: Can't instantiate abstract class"),
        ("class Bad(ExamplePlugin): pass", "cannot be used: it calls itself 'example'"),
        ("class Bad(ExamplePlugin):\n name = 'bad'\n vm_type = ExampleOptions", "which is not a VmSpec"),
        (
            _VM.format("port: int"),
            "Missing required argument 'port'",
        ),
        (
            _VM.format("agent: int = 1"),
            "its VMs change what every VM has: agent",
        ),
        (
            "class Bad(ExamplePlugin):\n name = 'bad'\n mechanisms = frozenset(['http', 'signal'])",
            _HTTP,
        ),
        (
            "class Bad(ExamplePlugin):\n name = 'bad'\n mechanisms = frozenset()",
            "names no way to resume a VM",
        ),
    ],
)
def test_a_driver_that_cannot_be_used_is_refused_by_name(install: Install, code: str, why: str) -> None:
    # A module of its own each: one that was imported once stays.
    install("bad", f"bad_{uuid4().hex}:Bad", _HEAD + code if code else "")
    with pytest.raises(DriverUnusable, match=r"^the driver 'bad' of caesura-driver-bad ") as caught:
        load_plugin("bad")
    assert why in str(caught.value)
    assert "Install caesura-driver-bad again" in str(caught.value) or "cannot be loaded" not in why
    assert isinstance(caught.value, ConfigError)  # a service ends with exit code 2 and is not started again
    with pytest.raises(HostFileError, match=r"^host\.toml: the driver 'bad' of"):
        parse_host_file('host = "h"\ndriver = "bad"\n', "host.toml")
    # Nobody else is bothered.
    assert parse_host_file(WITHOUT, "host.toml").driver == "process"
    with pytest.raises(HostFileError, match="unknown field `x`"):
        parse_host_file(WITHOUT + "[vm.x]\n", "host.toml")


def test_a_driver_that_is_not_installed_is_refused_with_what_is() -> None:
    with pytest.raises(
        DriverUnusable,
        match="'magic' is not installed; installed: 'container' and 'libvirt' and 'process' and 'proxmox' and 'qemu'",
    ):
        load_plugin("magic")


@pytest.mark.parametrize("name", ["vm", "a-b", "1a", "_x"])
def test_a_name_that_no_table_of_a_host_file_can_have_is_refused(install: Install, name: str) -> None:
    code = f"{_HEAD}class Named(ExamplePlugin):\n name = {name!r}\n"
    install(name, f"named_{uuid4().hex}:Named", code)
    with pytest.raises(DriverUnusable, match=f"^the driver '{name}' of .* cannot be used: .*name"):
        load_plugin(name)


def test_a_driver_of_two_packages_is_refused_and_one_that_is_found_twice_is_not(install: Install) -> None:
    install("example", EXAMPLE)
    install("example", EXAMPLE, package="the-same-again")
    assert load_plugin("example").name == "example"
    install("example", "elsewhere:Plugin", package="another")
    with pytest.raises(DriverUnusable, match=r"'example' is installed by another and .*: remove all but one"):
        load_plugin("example")


def test_a_plan_that_the_guard_does_not_know_is_refused_before_anything_is_paused() -> None:
    class Odd:
        name = "odd"

        def resume_plan(self, vm: str) -> Any:
            if vm == "down":
                raise DriverError(vm, "is not running")
            return SignalPlan(vm, 2, 1) if vm == "good" else ("http", "/run/odd.sock")

    odd: Any = Odd()
    check_plans(odd, ["good", "down"])
    with pytest.raises(
        DriverUnusable, match=r"'odd' cannot be used: VM bad: .*resumed by 'tuple'; the pause guard"
    ):
        check_plans(odd, ["good", "down", "bad"])


def test_the_example_is_not_in_the_product() -> None:
    assert {point.value.partition(".")[0] for point in entry_points(group=GROUP)} == {"caesura_host_updater"}
    assert ExampleDriver.__module__ == "caesura_testing.example_driver"
