"""The QEMU part of the host file: what is taken, and how what is not is named."""

from __future__ import annotations

import pytest

from caesura_host_updater.drivers.qemu.definition import QemuVm
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file

HEAD = 'host = "h"\ndriver = "qemu"\n'
VM = '[[vm]]\nname = "a"\nset = "web"\nupdate_domain = 1\n'
DEFINED = '[vm.qemu]\nmemory_mib = 256\nmachine = "pc-q35-7.2"\n'


def test_all_of_it() -> None:
    text = (
        HEAD
        + '[qemu]\nbinary = "/opt/qemu"\naccel = "kvm"\nrun_dir = "/run/c"\ndiscover = "/run/vms"\nreserve_memory = false\n'
        + VM
        + DEFINED
        + 'vcpus = 2\ncpu = "EPYC"\nkernel = "/k"\ninitrd = "/i"\nappend = "quiet"\nextra = ["-device", "x"]\n'
        + '[[vm.qemu.disk]]\nfile = "/d"\nformat = "raw"\n[[vm.qemu.nic]]\n[[vm.qemu.nic]]\nbridge = "br0"\n'
        + '[[vm]]\nname = "b"\n[vm.adopt]\nqmp = "/q"\nguard_qmp = "/g"\nguest_agent = "/ga"\n'
        + '[[vm]]\nname = "c"\n'
    )
    file = parse_host_file(text, "host.toml")
    a, b, c = file.vm
    assert file.options.accel == "kvm"
    assert isinstance(a, QemuVm)
    assert isinstance(b, QemuVm)
    assert isinstance(c, QemuVm)
    assert a.qemu is not None
    assert (a.qemu.disk[0].format, [nic.bridge for nic in a.qemu.nic]) == ("raw", [None, "br0"])
    assert b.adopt is not None
    assert b.adopt.guest_agent == "/ga"
    assert (c.qemu, c.adopt, c.set_name) == (None, None, "_c")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD + VM, "VM 'a' has no [vm.qemu] and no [vm.adopt], and [qemu] discover names no folder"),
        (HEAD + VM + DEFINED + '[vm.adopt]\nqmp = "/q"\n', "VM 'a' has both [vm.qemu] and [vm.adopt]"),
        (
            HEAD + VM + DEFINED + '[[vm.process]]\nargv = ["x"]\n',
            "driver 'qemu' takes [vm.qemu] or [vm.adopt]",
        ),
        (HEAD + VM + "ram_bytes = 1\n" + DEFINED, "ram_bytes"),
        ('host = "h"\n' + VM + DEFINED, "the host's driver is 'process'"),
        (HEAD + VM + DEFINED.replace("pc-q35-7.2", "q35"), "VM 'a' [vm.qemu]: machine 'q35' has no version"),
        (HEAD + VM + DEFINED.replace("7.2", "7.2,memory-backend=x"), "memory-backend"),
        (HEAD + VM + DEFINED + 'cpu = "host"', "cpu 'host' is another one"),
        (HEAD + VM + DEFINED + 'cpu = "max,+x"', "cpu 'max,+x' is another one"),
        (HEAD + VM + DEFINED + 'initrd = "/i"', "need a kernel"),
        (HEAD + VM + DEFINED + 'extra = ["-incoming", "x"]', "extra holds -incoming"),
        (HEAD + VM + DEFINED + 'kernel = "k"', "kernel"),
        (HEAD + VM + DEFINED.replace("256", "8"), "memory_mib"),
        (HEAD + VM + DEFINED + "vcpu = 2", "vcpu"),
        (HEAD + VM + DEFINED + '[[vm.qemu.disk]]\nfile = "d"', "file"),
        (HEAD + VM + DEFINED + '[[vm.qemu.disk]]\nfile = "/d"\nformat = "vmdk"', "vmdk"),
        (HEAD + VM + DEFINED + '[[vm.qemu.nic]]\nbridge = "a b"', "bridge"),
        (HEAD + VM + DEFINED + '[[vm.qemu.nic]]\nmac = "1"', "mac"),
        (HEAD + VM + '[vm.adopt]\nguard_qmp = "/g"\n', "qmp"),
        (HEAD + '[qemu]\naccel = "xen"', "xen"),
        (HEAD + "[qemu]\nbinray = 1", "binray"),
    ],
)
def test_bad_host_files_are_named(text: str, why: str) -> None:
    with pytest.raises(HostFileError, match=r"^host\.toml: ") as caught:
        parse_host_file(text, "host.toml")
    assert why in str(caught.value)
