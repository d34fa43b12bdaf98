"""Domains as VMs: their names, their labels, and what cannot be one."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura.contract.names import is_name
from caesura_host_updater.drivers.libvirt.definition import (
    BadLabel,
    FoundDomain,
    Label,
    pid_files,
    qmp_sockets,
    read_label,
    usual_sockets,
    vms_of,
)
from caesura_host_updater.inventory.host_config import HostFileError, parse_host_file


def _domain(name: str, label: str = "") -> FoundDomain:
    return FoundDomain(name=name, uuid=name, number=1, label=label)


def test_a_label_reads_as_it_was_written() -> None:
    label = Label(set="web", update_domain=3, fault_domain=2, name="web-1", agent=True)
    assert read_label(label.xml) == label
    assert read_label(Label().xml) == Label()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<vm sett='web'/>", "it has sett; known are set,"),
        ("<vm set='web'/>", "in set 'web' and has no update-domain"),
        ("<vm update-domain='1'/>", "an update-domain and no set"),
        ("<vm set='web' update-domain='20'/>", "update-domain is '20', not a number from 0 to 19"),
        ("<vm set='web' update-domain='-1'/>", "update-domain is '-1'"),
        ("<vm set='web' update-domain='²'/>", "update-domain is '²'"),
        ("<vm set='_web' update-domain='1'/>", "starts with an underscore"),
        ("<vm name='a/b'/>", "'a/b'"),
        ("<vm agent='true'/>", "agent is 'true', not yes or no"),
        ("<vm", "it is not XML"),
        ("<c:label xmlns:c='urn:caesura:libvirt' set='web'/>", "it is an element label, not vm"),
        ("<c:vm xmlns:c='urn:other'/>", "it is an element {urn:other}vm, not vm"),
        (
            "<vm><set>web</set><update-domain>0</update-domain></vm>",
            "it has elements in it: set, update-domain",
        ),
        ("<vm>set=web</vm>", "it has text in it: 'set=web'"),
    ],
)
def test_a_label_with_a_mistake_is_named(text: str, why: str) -> None:
    with pytest.raises(BadLabel, match=why):
        read_label(text)
    (vm,), passed = vms_of([_domain("web-1", text)], "all")
    assert why in vm.label_error
    assert "caesura libvirt label web-1" in vm.label_error
    assert (vm.set, vm.update_domain, passed) == ("", None, {})


def test_what_libvirt_makes_of_a_label_is_one() -> None:
    """It puts its namespace there, and space between the lines."""
    text = "<caesura:vm xmlns:caesura='urn:caesura:libvirt' set='web' update-domain='1'>\n  <!-- mine -->\n</caesura:vm>"
    assert read_label(text) == Label(set="web", update_domain=1)


def test_remedies_can_be_pasted() -> None:
    """Whatever a domain is called."""
    name = "Web's server; rm -rf $HOME"
    (vm,), _ = vms_of([_domain(name, "<vm sett=''/>")], "all")
    _, passed = vms_of([_domain(name + "x" * 70)], "all")
    for text, wanted in ((vm.label_error, name), (passed[name + "x" * 70], name + "x" * 70)):
        command = text.split("`")[1].removesuffix(" …")
        assert shlex.split(command)[:4] == ["caesura", "libvirt", "label", wanted]


def test_names_that_cannot_be_on_the_bus_are_escaped_and_never_shared() -> None:
    vms, passed = vms_of(
        [_domain("web.1"), _domain("web-1"), _domain("a b"), _domain("a/b"), _domain("x" * 70)], "all"
    )
    assert [(vm.name, vm.domain_name) for vm in vms] == [("web-1", "web-1")]
    assert set(passed) == {"web.1", "a b", "a/b", "x" * 70}
    assert all("caesura libvirt label" in why for why in passed.values())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=70), unique=True))
def test_no_two_vms_have_one_name_and_no_domain_is_lost(names: list[str]) -> None:
    vms, passed = vms_of([_domain(name) for name in names], "all")
    assert len({vm.name for vm in vms}) == len(vms)
    assert all(is_name(vm.name) and not vm.name.startswith("_") for vm in vms)
    assert {vm.domain_name for vm in vms} | passed.keys() == set(names)


def test_only_labelled_domains_if_the_host_file_says_so() -> None:
    vms, _ = vms_of([_domain("a"), _domain("b", "<vm/>")], "labelled")
    assert [vm.name for vm in vms] == ["b"]


def test_the_sockets_of_its_own_are_found_on_a_command_line() -> None:
    words = [
        "qemu",
        "-qmp",
        "unix:/run/a.qmp,server=on,wait=off",
        "-monitor",
        "unix:/run/m,server=on",
        "-qmp",
        "tcp:1",
    ]
    assert qmp_sockets(words) == ["/run/a.qmp"]
    assert qmp_sockets(["qemu", "-qmp"]) == []


def test_where_daemons_are() -> None:
    assert usual_sockets("qemu:///system", "/run/user/1") == (
        "/run/libvirt/virtqemud-sock",
        "/run/libvirt/libvirt-sock",
    )
    assert usual_sockets("qemu:///session", "/run/user/1")[1] == "/run/user/1/libvirt/libvirt-sock"
    assert pid_files("/run/libvirt/libvirt-sock", "web-1")[0] == "/run/libvirt/qemu/web-1.pid"


def test_vms_of_the_host_file_are_refused_with_the_command() -> None:
    text = 'host = "h"\ndriver = "libvirt"\n[[vm]]\nname = "web-1"\nset = "web"\nupdate_domain = 1\n'
    with pytest.raises(HostFileError, match="caesura libvirt label web-1 --set web --update-domain 1"):
        parse_host_file(text, "host.toml")
    assert parse_host_file('host = "h"\ndriver = "libvirt"\n', "host.toml").options.uri == "qemu:///system"
