"""The instance metadata of one VM."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest

from caesura.contract.messages import VmRecord
from caesura.fleet.state import LocatedVm
from caesura_metadata_publisher.api_versions import INSTANCE_VERSIONS
from caesura_metadata_publisher.instance import InstanceLocation, answer_instance, instance_tree, vm_id

WEB = LocatedVm("host-7", VmRecord(vm="web-1", set="web", update_domain=2, fault_domain=1, state="running"))
LONE = LocatedVm("host-7", VmRecord(vm="db", set="_db", update_domain=0, state="running"))


def whole(placed: LocatedVm = WEB, version: str = "2021-02-01") -> dict[str, Any]:
    answer = answer_instance(instance_tree(placed, version, InstanceLocation(), "10.0.0.4"), (), "json")
    assert answer.status == 200
    decoded = json.loads(answer.body)
    assert isinstance(decoded, dict)
    return decoded


def get(*path: str, form: str = "text", version: str = "2021-02-01") -> tuple[int, str]:
    tree = instance_tree(WEB, version, InstanceLocation(), "10.0.0.4")
    answer = answer_instance(tree, path, "text" if form == "text" else "json")
    return answer.status, answer.body.decode()


def test_a_workload_learns_its_name_domains_set_and_host() -> None:
    compute = whole()["compute"]
    assert compute["name"] == "web-1"
    assert (compute["platformUpdateDomain"], compute["platformFaultDomain"]) == ("2", "1")
    assert compute["tags"] == "caesura_host:host-7;caesura_set:web"
    assert {"name": "caesura_set", "value": "web"} in compute["tagsList"]
    assert compute["resourceId"].endswith("/providers/Microsoft.Compute/virtualMachines/web-1")


def test_ids_are_stable_guids() -> None:
    assert vm_id("web-1") == vm_id("web-1") != vm_id("web-2")
    assert UUID(whole()["compute"]["vmId"]) == UUID(vm_id("web-1"))
    UUID(whole()["compute"]["placementGroupId"])


def test_a_vm_in_no_set_has_no_placement_group() -> None:
    compute = whole(LONE)["compute"]
    assert compute["placementGroupId"] == ""
    assert compute["tags"] == "caesura_host:host-7"


def test_what_an_agent_of_the_cloud_needs_is_there() -> None:
    interface = whole()["network"]["interface"][0]
    assert interface["ipv4"]["ipAddress"][0]["privateIpAddress"] == "10.0.0.4"
    assert len(interface["macAddress"]) == 12


@pytest.mark.parametrize("version", INSTANCE_VERSIONS)
def test_every_primitive_is_a_string(version: str) -> None:
    def check(node: object) -> None:
        if isinstance(node, dict):
            for child in node.values():
                check(child)
        elif isinstance(node, list):
            for child in node:
                check(child)
        else:
            assert isinstance(node, str)

    check(whole(version=version))


def test_fields_appear_with_the_version_that_brought_them() -> None:
    assert "tagsList" not in whole(version="2019-06-01")["compute"]
    assert "tagsList" in whole(version="2019-06-04")["compute"]
    assert "host" not in whole(version="2021-02-01")["compute"]
    assert whole(version="2021-11-15")["compute"]["host"]["id"].endswith("/hosts/host-7")


def test_a_leaf_needs_text() -> None:
    assert get("compute", "name") == (200, "web-1")
    assert get("compute", "platformUpdateDomain") == (200, "2")
    status, body = get("compute", "name", form="json")
    assert (status, "format=text" in body) == (400, True)


def test_parts_of_the_tree() -> None:
    status, body = get("compute", form="json")
    assert (status, json.loads(body)["name"]) == (200, "web-1")
    assert get("network", "interface", "0", "ipv4", "ipAddress", "0", "privateIpAddress") == (200, "10.0.0.4")
    assert get() == (200, "compute/\nnetwork/")
    assert get("network", "interface") == (200, "0/")


@pytest.mark.parametrize(
    "path",
    [
        ("nothing",),
        ("compute", "nothing"),
        ("compute", "name", "more"),
        ("network", "interface", "1"),
        ("network", "interface", "-1"),
        ("network", "interface", "²"),
        ("compute", "host"),
    ],
)
def test_what_is_not_there_is_404(path: tuple[str, ...]) -> None:
    assert get(*path)[0] == 404
