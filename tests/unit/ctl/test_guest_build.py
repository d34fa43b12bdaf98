"""Building the guest: archives, libraries, packages, the command's errors. Nothing is fetched here."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caesura_guest_image import agent
from caesura_guest_image.contents import APPLETS, MODULES, loader
from caesura_guest_image.cpio import FOLDER, file_entry, link_entry, pack
from caesura_guest_image.elf import NotElf, needed_libraries
from caesura_guest_image.packages import GuestError, kernel_package, parse_uris, run_tool
from caesura_guest_image.second import qemu_version
from caesura_testing.patience import patient

# -- archives -------------------------------------------------------------------------------------------------


def read_cpio(archive: bytes) -> list[tuple[str, int, bytes]]:
    """An independent reader of the format: (name, mode, data) up to the trailer."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * each : at + 14 + 8 * each], 16) for each in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        begin = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found.append((name, fields[1], archive[begin : begin + size]))
        at = (begin + size + 3) // 4 * 4


def test_an_archive_holds_what_was_put_in_and_the_folders_above_it() -> None:
    archive = pack(
        {
            "init": file_entry(b"#!/bin/sh\n", executable=True),
            "usr/lib/odd": file_entry(b"12345"),
            "bin/sh": link_entry("busybox"),
            "proc": FOLDER,
        }
    )
    found = {name: (mode, data) for name, mode, data in read_cpio(archive)}
    assert found == {
        "bin": (stat.S_IFDIR | 0o755, b""),
        "bin/sh": (stat.S_IFLNK | 0o777, b"busybox"),
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
        "proc": (stat.S_IFDIR | 0o755, b""),
        "usr": (stat.S_IFDIR | 0o755, b""),
        "usr/lib": (stat.S_IFDIR | 0o755, b""),
        "usr/lib/odd": (stat.S_IFREG | 0o644, b"12345"),
    }
    names = [name for name, _, _ in read_cpio(archive)]
    assert names == sorted(names), "a folder comes before what is in it"
    assert len(archive) % 512 == 0


def test_the_same_entries_make_the_same_archive_in_any_order() -> None:
    entries = {"b": file_entry(b"2"), "a/x": file_entry(b"1")}
    assert pack(entries) == pack(dict(reversed(entries.items())))


# -- libraries ------------------------------------------------------------------------------------------------


def test_the_libraries_of_a_program_are_read_from_it() -> None:
    program = Path("/bin/sh").resolve().read_bytes()
    assert "libc.so.6" in needed_libraries(program)


@pytest.mark.parametrize(
    "data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(100), b"\x7fELF\x02\x01", None]
)
def test_what_is_no_elf_file_is_refused(data: bytes | None) -> None:
    if data is None:  # a real one, cut off in its headers
        data = Path("/bin/sh").resolve().read_bytes()[:100]
    with pytest.raises(NotElf):
        needed_libraries(data)


# -- packages -------------------------------------------------------------------------------------------------

URIS = """\
'http://deb.debian.org/debian/pool/main/b/busybox/busybox-static_1.35.0-4_amd64.deb' busybox-static_1%3a1.35.0-4_amd64.deb 928188 SHA256:ab
W: something else
'http://deb.debian.org/debian/pool/main/l/linux/linux-image-6.1.0-56-cloud-amd64_6.1_amd64.deb' linux-image-6.1.0-56-cloud-amd64_6.1_amd64.deb 26713492 SHA256:cd
"""


def test_what_apt_would_fetch_is_found_by_name() -> None:
    found = parse_uris(URIS)
    assert list(found) == ["busybox-static", "linux-image-6.1.0-56-cloud-amd64"]
    assert found["busybox-static"].file == "busybox-static_1%3a1.35.0-4_amd64.deb"
    assert found["busybox-static"].size == 928188


def test_the_kernel_is_the_one_that_the_metapackage_names() -> None:
    shown = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n"
    assert kernel_package(shown) == "linux-image-6.1.0-56-cloud-amd64"
    with pytest.raises(GuestError, match="depends on no kernel"):
        kernel_package("Package: linux-image-cloud-amd64\n")


def test_a_tool_that_fails_is_quoted() -> None:
    with pytest.raises(GuestError, match="sh failed: E: no network"):
        run_tool("sh", "-c", "echo chatter >&2; echo E: no network >&2; exit 100")
    with pytest.raises(GuestError, match=r"took longer than 0\.1 s"):
        run_tool("sleep", "5", timeout_s=0.1)


# -- contents -------------------------------------------------------------------------------------------------


def test_modules_come_after_those_they_need() -> None:
    assert MODULES.index("virtio_ring") < MODULES.index("virtio_pci") < MODULES.index("virtio_blk")
    assert MODULES.index("failover") < MODULES.index("net_failover") < MODULES.index("virtio_net")


def test_every_applet_that_init_uses_is_linked() -> None:
    init = (Path(agent.__file__).parent / "inside" / "init").read_text()
    used = {"mount", "mkdir", "cat", "insmod", "hostname", "ip", "udhcpc", "sleep"}
    assert all(f"{name} " in init for name in used)
    assert used <= set(APPLETS)


def test_the_guest_gets_the_agent_and_neither_the_tests_nor_other_services() -> None:
    names = [name for name, _ in agent.own_files()]
    assert "caesura_vm_agent/__main__.py" in names
    assert "caesura/bus/mqtt.py" in names
    assert not [
        name for name in names if "testing" in name or not name.startswith(("caesura/", "caesura_vm_agent/"))
    ]


def test_the_digest_follows_the_agents_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "caesura_vm_agent"
    source.mkdir()
    (source / "__init__.py").write_text("")
    monkeypatch.setattr(agent, "package_folder", lambda _: source)
    before = agent.digest()
    assert agent.digest() == before
    (source / "__init__.py").write_text("CHANGED = True\n")
    assert agent.digest() != before


def test_the_guests_python_runs_with_its_own_libraries() -> None:
    argv = loader(Path("/stage"))
    assert argv[0] == "/stage/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    assert argv[-1] == "/stage/usr/bin/python3.11"


# -- the command ----------------------------------------------------------------------------------------------


def build(tmp_path: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "caesura_ctl", "guest", "build", *words],
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=patient(60),
    )


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_without_apt_it_says_what_to_do(tmp_path: Path) -> None:
    done = build(tmp_path, str(tmp_path))
    assert done.returncode == 1
    assert "apt-get is not installed" in done.stderr
    assert "--output DIR and copy DIR here" in done.stderr
    told = build(tmp_path, str(tmp_path), "--json")
    assert json.loads(told.stderr.splitlines()[-1])["error"] == "GuestError"


def test_without_network_aptitudes_own_words_are_shown(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tool(tools, "dpkg-deb", "exit 0")
    tool(tools, "apt-get", "echo 'E: Could not resolve deb.debian.org' >&2; exit 100")
    tool(
        tools, "apt-cache", 'printf "Package: x\\nVersion: 1\\nDepends: linux-image-1-cloud-amd64\\n"; exit 0'
    )
    done = build(tmp_path, f"{tools}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "Could not resolve deb.debian.org" in done.stderr or "debian-archive-keyring" in done.stderr


# A shell's background job, as a test run may be one, ignores SIGINT, and so do its children.
_AS_FROM_A_TERMINAL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from caesura_ctl.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing_half_made(tmp_path: Path, number: signal.Signals) -> None:
    tools = tmp_path / "bin"
    tool(tools, "dpkg-deb", "touch unpacking; exec sleep 60")
    tool(
        tools,
        "apt-get",
        'for last in "$@"; do :; done\n'
        'case "$*" in\n'
        '  *--print-uris*) for each in "$@"; do echo "\'http://x/$each\' ${each}_1_all.deb 0 SHA256:0"; done ;;\n'
        '  *) for each in "$@"; do : >"${each##*/}_1_all.deb"; done ;;\n'
        "esac",
    )
    version = "Version: 1\\n"
    tool(tools, "apt-cache", f'printf "Package: x\\n{version * 3}Depends: linux-image-1-cloud-amd64\\n"')
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_FROM_A_TERMINAL, "guest", "build"],
        env={
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    cache = tmp_path / "cache" / "caesura" / "guest"
    end = time.monotonic() + 30
    while not (tmp_path / "unpacking").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    # As from a terminal: the whole process group hears it.
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=patient(30))
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert [
        path.name for path in cache.iterdir() if path.name.startswith(("making-", "base-", "guest-"))
    ] == []


def test_a_second_qemu_without_its_libraries_says_so(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "qemu", "echo 'error while loading shared libraries: libfdt.so.1' >&2; exit 127")
    with pytest.raises(GuestError, match=r"libfdt.so.1.*apt-get install qemu-system-x86"):
        qemu_version(str(tmp_path / "bin" / "qemu"))
    tool(tmp_path / "bin", "qemu", "echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2)'")
    assert qemu_version(str(tmp_path / "bin" / "qemu")) == "10.0.2"
