"""VMs of Proxmox by their configurations: tags, locks, sections, and what cannot be read as meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_host_updater.drivers.proxmox.definition import (
    BadTags,
    Placement,
    ProxmoxOptions,
    is_tagged,
    main_section,
    placement_of,
    read_config,
    sockets_of,
    started_with,
    tags_of,
    vmid_of,
)
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file

PLAIN = """boot: order=scsi0;net0
cores: 2
memory: 4096
name: web
net0: virtio=BC:24:11:2C:69:EC,bridge=vmbr0
ostype: l26
scsi0: local-lvm:vm-101-disk-0,iothread=1,size=32G
smbios1: uuid=b3247ab1-1fe6-428e-965b-08a1b64a8746
tags: caesura-fd-1;caesura-set-web;caesura-ud-3;production
vmgenid: 7079e97c-50e3-4079-afe7-23e67566b946
"""

EVERYTHING = """#lock%3A migrate
#tags: caesura-set-comment;caesura-ud-7
agent: enabled=1,fstrim_cloned_disks=1,type=virtio
args: -device 'foo,name: bar'
lock: backup
name: db
tags: caesura-set-db,caesura-ud-0
unused0: local-lvm:vm-102-disk-1

[PENDING]
agent: 0
delete: lock
name: db-new
tags: caesura-set-pending;caesura-ud-1

[special:cloudinit]
name: db-cloud

[before]
#snapshot%3A of the old release
agent: 0
lock: snapshot
name: db-old
snapstate: prepare
tags: caesura-set-old;caesura-ud-2
template: 1
"""


def test_a_plain_configuration() -> None:
    vm = read_config(101, PLAIN, "vm-101")
    assert (vm.name, vm.title, vm.called) == ("vm-101", "web", "VM 101 (web)")
    assert (vm.set, vm.update_domain, vm.fault_domain) == ("web", 3, 1)
    assert (vm.lock, vm.template, vm.guest_agent, vm.tag_error, vm.not_now) == ("", False, False, "", "")


def test_comments_snapshots_and_pending_changes_are_not_in_force() -> None:
    vm = read_config(102, EVERYTHING, "vm-102")
    assert (vm.title, vm.set, vm.update_domain, vm.lock, vm.template) == ("db", "db", 0, "backup", False)
    assert vm.guest_agent
    assert "lock: backup" in vm.not_now
    assert "qm unlock 102" in vm.not_now
    assert set(main_section(EVERYTHING)) == {"agent", "args", "lock", "name", "tags", "unused0"}


@pytest.mark.parametrize("section", ["[snap]", "[PENDING]", "[special:fleecing]", "[what is this?]", "[a]  "])
def test_a_lock_below_any_section_is_none(section: str) -> None:
    assert read_config(100, f"name: a\n\n{section}\nlock: backup\n", "vm-100").lock == ""
    assert read_config(100, f"lock: backup\n{section}\nname: a\n", "vm-100").lock == "backup"


def test_a_template_and_one_without_a_name() -> None:
    vm = read_config(100, "template: 1\nmemory: 512\n", ProxmoxOptions(prefix="east-").name_of(100))
    assert vm.template
    assert "template" in vm.not_now
    assert (vm.name, vm.called, vm.title) == ("east-100", "VM 100", "")


@pytest.mark.parametrize(
    ("value", "enabled"),
    [
        ("1", True),
        ("0", False),
        ("1,fstrim_cloned_disks=1", True),
        ("enabled=1", True),
        ("enabled=0,type=isa", False),
        ("fstrim_cloned_disks=1,enabled=1", True),
        ("type=virtio", False),
    ],
)
def test_the_guest_agent(value: str, enabled: bool) -> None:
    assert read_config(100, f"agent: {value}\n", "vm-100").guest_agent is enabled


@pytest.mark.parametrize(
    ("tags", "placement"),
    [
        ("", Placement()),
        ("web;db;caesura", Placement()),
        ("caesura-set-web;caesura-ud-0", Placement("web", 0, 0)),
        ("caesura-ud-19 caesura-set-a_b-c", Placement("a_b-c", 19, 0)),
        ("caesura-set-web, caesura-ud-4 ;caesura-fd-2", Placement("web", 4, 2)),
        ("caesura-fd-1", Placement("", None, 1)),
        ("caesura-set-web;caesura-ud-0;caesura-ud-0", Placement("web", 0, 0)),
    ],
)
def test_tags(tags: str, placement: Placement) -> None:
    assert placement_of(tags_of({"tags": tags})) == placement


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ("caesura-st-web", "caesura-st-web is not known"),
        ("caesura-update-domain-0", "not known"),
        ("caesura_set-web", "caesura_set-web is not known"),
        ("Caesura-set-web;caesura-ud-0", "Caesura-set-web is not known"),
        ("caesura-set", "caesura-set is not known"),
        ("caesura-set-web", "in set web and has no update domain"),
        ("caesura-ud-0", "an update domain and no set"),
        ("caesura-set-web;caesura-set-db;caesura-ud-0", "two tags caesura-set-, web and db"),
        ("caesura-set-web;caesura-ud-0;caesura-ud-1", "two tags caesura-ud-, 0 and 1"),
        ("caesura-fd-0;caesura-fd-1", "two tags caesura-fd-"),
        ("caesura-set-web;caesura-ud-20", "caesura-ud-20 does not end with a number from 0 to 19"),
        ("caesura-set-web;caesura-ud-", "caesura-ud- does not end with a number"),
        ("caesura-set-web;caesura-ud--1", "does not end with a number"),
        ("caesura-set-web;caesura-ud-0;caesura-fd-3", "caesura-fd-3 does not end with a number from 0 to 2"),
        ("caesura-set-;caesura-ud-0", "set name ''"),
        ("caesura-set-web.1;caesura-ud-0", "'web.1'"),
        ("caesura-set-_web;caesura-ud-0", "underscore"),
    ],
)
def test_tags_with_a_mistake_are_named_and_the_vm_is_not_paused(tags: str, why: str) -> None:
    with pytest.raises(BadTags, match=why.replace("'", ".")):
        placement_of(tags_of({"tags": tags}))
    vm = read_config(100, f"name: a\ntags: {tags}\n", "vm-100")
    assert why in vm.not_now
    assert "qm set 100 --tags" in vm.not_now
    assert (vm.set, vm.update_domain) == ("", None)


def test_which_are_tagged() -> None:
    assert is_tagged("tags: caesura\n")
    assert is_tagged("tags: web;caesura-st-typo\n")
    assert not is_tagged("tags: web\n[snap]\ntags: caesura\n")


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    vm = read_config(100, text, "vm-100")
    assert vm.name == "vm-100"


@pytest.mark.parametrize(
    ("file", "vmid"),
    [("100.conf", 100), ("999999999.conf", 999999999), ("100.conf.tmp.12", None), ("0.conf", None), ("a.conf", None), ("100", None)],
)  # fmt: skip
def test_files(file: str, vmid: int | None) -> None:
    assert vmid_of(file) == vmid


def test_places_and_processes() -> None:
    assert sockets_of("/var/run/qemu-server", 100) == (
        "/var/run/qemu-server/100.qmp",
        "/var/run/qemu-server/100.qga",
    )
    assert started_with(
        ["/usr/bin/kvm", "-id", "100", "-pidfile", "/run/100.pid", "-daemonize"], "/run/100.pid"
    )
    assert started_with(["kvm", "-pidfile", "/run/qemu-server/100.pid"], "/var/run/qemu-server/100.pid")
    assert not started_with(["/usr/bin/kvm", "-pidfile", "/run/1000.pid"], "/run/100.pid")
    assert not started_with(["cat", "/run/100.pid"], "/run/100.pid")


def test_the_host_file_has_no_vms() -> None:
    host = 'host = "h"\ndriver = "proxmox"\n'
    assert parse_host_file(host, "host.toml").vm == ()
    with pytest.raises(HostFileError, match="caesura-set-web;caesura-ud-2"):
        parse_host_file(f'{host}[[vm]]\nname = "a"\nset = "web"\nupdate_domain = 2\n', "host.toml")
    with pytest.raises(HostFileError, match="prefix"):
        parse_host_file(f'{host}[proxmox]\nprefix = "_vm"\n', "host.toml")
    with pytest.raises(HostFileError, match="config_dir"):
        parse_host_file(f'{host}[proxmox]\nconfig_dir = "pve"\n', "host.toml")
