"""The host file and updates.d: what is taken, and how what is not is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caesura.contract.messages import RefusedUpdate
from caesura_host_updater.drivers.qemu.plugin import ram_dir
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file, read_host_file
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.inventory.updates import UpdateFile, catalogue, parse_update, read_updates

VM = '[[vm]]\nname = "a"\nset = "web"\nupdate_domain = 1\n[[vm.process]]\nargv = ["sleep", "1"]\n'
UPDATE = (
    'name = "patch"\nimpact = "pause"\nscope = "host"\nargv = ["/bin/true"]\nexpected_s = 1\ntimeout_s = 5\n'
)
KEXEC = 'kernel = "kexec"\nkernel_release = "6.1.0-9-amd64"\n'


def find(program: str) -> str | None:
    """As shutil.which on a machine that has only /bin/true."""
    return program if program == "/bin/true" else None


def test_host_file() -> None:
    file = parse_host_file(
        f'host = "h"\n{VM}[[vm]]\nname = "b"\n[[vm.process]]\nargv = ["true"]\n', "host.toml"
    )
    assert [(vm.name, vm.set_name, vm.domain, vm.agent) for vm in file.vm] == [
        ("a", "web", 1, True),
        ("b", "_b", 0, True),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("host = ", "end of document"),
        (f'host = "h"\n{VM}{VM}', "VM 'a' stands 2 times"),
        ('host = "h.x"', "host name 'h.x'"),
        ('host = "h"\n' + VM.replace('"a"', '"_a"'), "underscore"),
        ('host = "h"\n' + VM.replace("update_domain = 1\n", ""), "no update_domain"),
        ('host = "h"\n' + VM.replace('set = "web"\n', ""), "no set"),
        ('host = "h"\n' + VM.replace("update_domain = 1", "update_domain = 20"), "update_domain"),
        ('host = "h"\nhots = 1', "hots"),
        ('host = "h"\n' + VM.replace("argv", "arg"), "arg"),
        ('host = "h"\n[[vm]]\nname = "a"\n', "no [[vm.process]]"),
        (
            'host = "h"\ndriver = "magic"',
            "'magic': write 'container', 'libvirt', 'process', 'proxmox' or 'qemu' - at `$.driver`",
        ),
        (
            'host = "h"\n[process]\nfreezer = "ice"',
            "'ice': write 'auto', 'cgroup1', 'cgroup2' or 'sigstop' - at `$.process.freezer`",
        ),
        (
            'host = "h"\n' + VM.replace("[[vm.process]]", "[[vm.qemu.disk]]\nfile = '/a'\nformat = 'vdi'"),
            "'vdi': write 'qcow2' or 'raw' - at `$.vm[0].qemu.disk[0].format`",
        ),
    ],
)
def test_bad_host_files_are_named(text: str, why: str) -> None:
    with pytest.raises(HostFileError, match=r"^host\.toml: ") as caught:
        parse_host_file(text, "host.toml")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('host = "h"\n[kernel]\nkexec = true', "kexec = true needs driver"),
        ('host = "h"\n[kernel]\ncarve_out = "here"', "carve_out"),
        ('host = "h"\n[kernel]\ncarve_out = "/a/../b"', "not the plain path"),
        ('host = "h"\n[kernel]\nwatchdog_s = -1', "watchdog_s"),
        ('host = "h"\n[kernel]\nkexek = true', "kexek"),
        (
            'host = "h"\ndriver = "qemu"\n[kernel]\nkexec = true\n[qemu]\nram_dir = "/tmp"',
            "ram_dir '/tmp' is not in the carve-out",
        ),
    ],
)
def test_bad_kernel_tables_are_named(text: str, why: str) -> None:
    with pytest.raises(HostFileError, match=r"^host\.toml: ") as caught:
        parse_host_file(text, "host.toml")
    assert why in str(caught.value)


def test_a_kernel_table_and_where_guests_ram_is_with_it() -> None:
    file = parse_host_file('host = "h"\ndriver = "qemu"\n[kernel]\nkexec = true\n', "host.toml")
    assert file.kernel == KernelOptions(kexec=True)
    assert ram_dir(file.options, file.kernel) == "/var/lib/caesura/carve-out/ram"
    assert ram_dir(file.options, KernelOptions()) == file.options.ram_dir


def test_missing_host_file() -> None:
    with pytest.raises(HostFileError, match="/does/not/exist: cannot be read"):
        read_host_file("/does/not/exist")


def test_a_host_file_that_is_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "host.toml")
    with pytest.raises(HostFileError, match=r"host\.toml: cannot be read: it is a FIFO"):
        read_host_file(str(tmp_path / "host.toml"))


def test_update_file() -> None:
    update = parse_update("patch.toml", UPDATE, find=find)
    assert isinstance(update, UpdateFile)
    assert update.record().update == "patch"
    assert not hasattr(update.record(), "argv")


def test_an_update_that_starts_a_kernel() -> None:
    update = parse_update("kernel.toml", UPDATE + KEXEC, find=find)
    assert isinstance(update, UpdateFile)
    assert update.method == "kexec"
    assert (update.record().kernel, update.record().kernel_release) == ("kexec", "6.1.0-9-amd64")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (UPDATE + "x =", 7, ""),
        (
            UPDATE.replace('"pause"', '"explode"'),
            2,
            "'explode': write 'none', 'pause' or 'reboot' - at `$.impact`",
        ),
        (UPDATE + 'vmm = "near"\n', 7, "'near': write '', 'beside' or 'instead'"),
        (UPDATE.replace("timeout_s = 5", "timeout_s = 0"), 6, "> 0"),
        (UPDATE.replace('["/bin/true"]', "[]"), 4, "length"),
        (UPDATE.replace("/bin/true", "nowhere"), 4, "'nowhere' is not on PATH"),
        (UPDATE + "colour = 1\n", 7, "colour"),
        (UPDATE.replace('name = "patch"\n', ""), 0, "name"),
        (UPDATE.replace('"patch"', '"a b"'), 1, "'a b'"),
        (UPDATE.replace("expected_s = 1", "expected_s = 9"), 5, "above timeout_s"),
        (UPDATE + "[environ]\nCAESURA_VM = 'x'\n", 7, "CAESURA_"),
        (UPDATE + "working_directory = 'here'\n", 7, "absolute"),
        (UPDATE + 'kernel = "kexec"\n', 7, "needs kernel_release"),
        (UPDATE + 'kernel_release = "6.1.0-9-amd64"\n', 7, "says nothing without kernel"),
        (UPDATE.replace('"host"', '"vm"') + KEXEC, 7, "scope = 'host'"),
        (UPDATE.replace('"pause"', '"none"') + KEXEC, 7, "impact = 'pause'"),
        (UPDATE + KEXEC + 'vmm = "instead"\n', 9, "leave vmm out"),
        (UPDATE + KEXEC.replace("6.1", "../6.1"), 8, "kernel_release"),
    ],
)
def test_broken_update_is_refused_by_name_and_line(text: str, line: int, why: str) -> None:
    refused = parse_update("broken.toml", text, find=find)
    assert isinstance(refused, RefusedUpdate), refused
    assert (refused.file, refused.line) == ("broken.toml", line)
    assert why in refused.reason


def test_others_stay_usable_and_the_second_of_a_name_is_refused() -> None:
    found = catalogue(
        [
            ("c.toml", "no"),
            ("b.toml", UPDATE),
            ("a.toml", UPDATE),
            ("d.toml", UPDATE.replace("patch", "other")),
        ],
        find=find,
    )
    assert sorted(found.updates) == ["other", "patch"]
    assert [(each.file, each.line) for each in found.refused] == [("b.toml", 1), ("c.toml", 1)]
    assert "a.toml" in found.refused[0].reason


def test_folder(tmp_path: Path) -> None:
    assert read_updates(str(tmp_path / "absent")).updates == {}
    (tmp_path / "good.toml").write_text(UPDATE)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "ignored.txt").write_text("no")
    found = read_updates(str(tmp_path))
    assert list(found.updates) == ["patch"]
    assert [each.file for each in found.refused] == ["binary.toml"]
    (refused,) = read_updates(str(tmp_path / "good.toml")).refused
    assert refused.file.endswith("/good.toml")
    assert refused.reason == "cannot be read: Not a directory"


def test_what_is_not_a_regular_file_is_refused_by_name_and_never_waited_for(tmp_path: Path) -> None:
    """Opening a FIFO waits for a writer: this test would not end."""
    (tmp_path / "good.toml").write_text(UPDATE)
    os.mkfifo(tmp_path / "hangs.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    found = read_updates(str(tmp_path))
    assert list(found.updates) == ["patch"]
    why = {each.file: each.reason for each in found.refused}
    assert "it is a FIFO, not a regular file" in why["hangs.toml"]
    assert "it is a folder" in why["folder.toml"]
    assert "it is a device" in why["device.toml"]
    assert "such a file has 1048576 at most" in why["huge.toml"]
