"""The instance metadata of one VM."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any
from unittest.mock import ANY
from uuid import UUID

import pytest

from caesura.contract.messages import VmDetails, VmImage, VmInterface, VmPublicKey, VmRecord
from caesura.fleet.state import LocatedVm
from caesura_metadata_publisher.api_versions import INSTANCE_VERSIONS
from caesura_metadata_publisher.instance import answer_instance
from caesura_metadata_publisher.instance_fields import InstanceLocation, instance_tree, vm_id

WEB = LocatedVm("host-7", VmRecord(vm="web-1", set="web", update_domain=2, fault_domain=1, state="running"))
LONE = LocatedVm("host-7", VmRecord(vm="db", set="_db", update_domain=0, state="running"))


DETAILS = VmDetails(
    vm="web-1",
    host="host-7",
    size="Standard_D2s_v5",
    image=VmImage(publisher="Debian", offer="debian-12", sku="12", version="0.1", id="/images/7"),
    zone="2",
    physical_zone="north-AZ02",
    tags={"team": "shop"},
    interfaces=(
        VmInterface(mac="00:0d:3a:f8:06:ec", ipv4="10.0.0.4/24", public_ipv4="192.0.2.7", ipv6="fd00::4"),
        VmInterface(ipv4="10.1.0.4/16"),
    ),
    scale_set="shop",
    computer_name="web-1.example",
    admin_username="ops",
    public_keys=(VmPublicKey(path="/home/ops/.ssh/authorized_keys", key="ssh-ed25519 AAAA"),),
    priority="Spot",
    eviction_policy="Deallocate",
    license_type="RHEL_BYOS",
    user_data="I2Nsb3VkLWNvbmZpZwo=",
)


def whole(
    placed: LocatedVm = WEB, version: str = "2021-02-01", details: VmDetails | None = DETAILS
) -> dict[str, Any]:
    answer = answer_instance(instance_tree(placed, details, version, InstanceLocation()), (), "json")
    assert answer.status == 200
    decoded = json.loads(answer.body)
    assert isinstance(decoded, dict)
    return decoded


def get(*path: str, form: str = "text", version: str = "2021-02-01") -> tuple[int, str]:
    tree = instance_tree(WEB, DETAILS, version, InstanceLocation())
    answer = answer_instance(tree, path, "text" if form == "text" else "json")
    return answer.status, answer.body.decode()


def test_a_workload_learns_its_name_domains_set_and_host() -> None:
    compute = whole()["compute"]
    assert compute["name"] == "web-1"
    assert (compute["platformUpdateDomain"], compute["platformFaultDomain"]) == ("2", "1")
    assert compute["tags"] == "team:shop;caesura_host:host-7;caesura_set:web"
    assert {"name": "caesura_set", "value": "web"} in compute["tagsList"]
    assert compute["resourceId"].endswith("/providers/Microsoft.Compute/virtualMachines/web-1")


def test_ids_are_stable_guids() -> None:
    assert vm_id("web-1") == vm_id("web-1") != vm_id("web-2")
    assert UUID(whole()["compute"]["vmId"]) == UUID(vm_id("web-1"))
    UUID(whole()["compute"]["placementGroupId"])


def test_a_vm_in_no_set_has_no_placement_group() -> None:
    compute = whole(LONE, details=None)["compute"]
    assert compute["placementGroupId"] == ""
    assert compute["tags"] == "caesura_host:host-7"


def test_what_an_agent_of_the_cloud_needs_is_there_without_details() -> None:
    (interface,) = whole(details=None)["network"]["interface"]
    address = interface["ipv4"]["ipAddress"][0]["privateIpAddress"]
    assert IPv4Address(address) in IPv4Network("198.18.0.0/15"), "nobody's"
    assert len(interface["macAddress"]) == 12
    assert whole(LONE, details=None)["network"]["interface"][0] != interface
    assert whole(details=None)["network"]["interface"][0] == interface, "the same each time"


def test_what_the_host_file_says_is_shown() -> None:
    tree = whole(version="2025-04-07")
    compute = tree["compute"]
    expected = {
        "vmSize": "Standard_D2s_v5",
        "offer": "debian-12",
        "zone": "2",
        "physicalZone": "north-AZ02",
        "vmScaleSetName": "shop",
        "priority": "Spot",
        "evictionPolicy": "Deallocate",
        "licenseType": "RHEL_BYOS",
        "userData": "I2Nsb3VkLWNvbmZpZwo=",
        "azEnvironment": "AzurePublicCloud",
    }
    assert {name: compute[name] for name in expected} == expected
    assert compute["osProfile"] == {
        "adminUsername": "ops",
        "computerName": "web-1.example",
        "disablePasswordAuthentication": "true",
    }
    assert compute["publicKeys"] == [
        {"keyData": "ssh-ed25519 AAAA", "path": "/home/ops/.ssh/authorized_keys"}
    ]
    assert compute["virtualMachineScaleSet"]["id"].endswith("/virtualMachineScaleSets/shop")
    assert compute["storageProfile"]["imageReference"]["id"] == "/images/7"
    assert tree["network"]["interface"] == [
        {
            "ipv4": {
                "ipAddress": [{"privateIpAddress": "10.0.0.4", "publicIpAddress": "192.0.2.7"}],
                "subnet": [{"address": "10.0.0.0", "prefix": "24"}],
            },
            "ipv6": {"ipAddress": [{"privateIpAddress": "fd00::4"}]},
            "macAddress": "000D3AF806EC",
        },
        {
            "ipv4": {
                "ipAddress": [{"privateIpAddress": "10.1.0.4", "publicIpAddress": ""}],
                "subnet": [{"address": "10.1.0.0", "prefix": "16"}],
            },
            "ipv6": {"ipAddress": []},
            "macAddress": ANY,
        },
    ]


DOCUMENTED = {
    "2017-04-02": "location name offer osType platformFaultDomain platformUpdateDomain publisher sku version vmId vmSize",
    "2017-08-01": "placementGroupId resourceGroupName subscriptionId tags",
    "2017-12-01": "vmScaleSetName zone",
    "2018-04-02": "plan.name plan.product plan.publisher publicKeys",
    "2018-10-01": "azEnvironment provider",
    "2019-02-01": "customData",
    "2019-03-11": "resourceId",
    "2019-06-01": "storageProfile.imageReference.id storageProfile.imageReference.version storageProfile.dataDisks "
    "storageProfile.osDisk.caching storageProfile.osDisk.diffDiskSettings.option storageProfile.osDisk.managedDisk.id "
    "storageProfile.osDisk.encryptionSettings.enabled storageProfile.osDisk.vhd.uri",
    "2019-06-04": "tagsList",
    "2020-06-01": "isHostCompatibilityLayerVm securityProfile.secureBootEnabled securityProfile.virtualTpmEnabled",
    "2020-07-15": "osProfile.adminUsername osProfile.computerName",
    "2020-09-01": "licenseType",
    "2020-10-01": "osProfile.disablePasswordAuthentication",
    "2020-12-01": "evictionPolicy priority",
    "2021-01-01": "userData",
    "2021-02-01": "storageProfile.resourceDisk.size",
    "2021-03-01": "extendedLocation.name extendedLocation.type virtualMachineScaleSet.id",
    "2021-10-01": "platformSubFaultDomain",
    "2021-11-01": "additionalCapabilities.hibernationEnabled securityProfile.encryptionAtHost "
    "storageProfile.osDisk.encryptionSettings.diskEncryptionKey.sourceVault.id",
    "2021-11-15": "host.id hostGroup.id",
    "2021-12-13": "securityProfile.securityType",
    "2023-07-01": "storageProfile.imageReference.communityGalleryImageId storageProfile.imageReference.exactVersion",
    "2023-11-15": "physicalZone",
}


@pytest.mark.parametrize("details", [None, DETAILS])
@pytest.mark.parametrize(("since", "paths"), DOCUMENTED.items())
def test_a_documented_path_is_there_from_its_version_on_whatever_is_known(
    since: str, paths: str, details: VmDetails | None
) -> None:
    for dotted in paths.split():
        path = ("compute", *dotted.split("."))
        for version in INSTANCE_VERSIONS:
            tree = instance_tree(WEB, details, version, InstanceLocation())
            status = answer_instance(tree, path, "text").status
            expected = 200 if version >= since or since == "2017-04-02" else 404
            assert status == expected, (dotted, version)


@pytest.mark.parametrize("details", [None, DETAILS])
@pytest.mark.parametrize("version", INSTANCE_VERSIONS)
def test_every_primitive_is_a_string(version: str, details: VmDetails | None) -> None:
    def check(node: object) -> None:
        if isinstance(node, dict):
            for child in node.values():
                check(child)
        elif isinstance(node, list):
            for child in node:
                check(child)
        else:
            assert isinstance(node, str)

    check(whole(version=version, details=details))


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
    assert get("network", "interface") == (200, "0/\n1/")
    assert get("Network", "interface", "0", "macAddress") == (200, "000D3AF806EC")


@pytest.mark.parametrize(
    "path",
    [
        ("nothing",),
        ("compute", "nothing"),
        ("compute", "name", "more"),
        ("network", "interface", "2"),
        ("network", "interface", "-1"),
        ("network", "interface", "²"),
        ("compute", "host"),
    ],
)
def test_what_is_not_there_is_404(path: tuple[str, ...]) -> None:
    assert get(*path)[0] == 404
