"""Rules about the instance metadata and the other endpoints."""

from __future__ import annotations

import re
from typing import Any

from caesura_metadata_conformance.exchange import Reply
from caesura_metadata_conformance.probe import INSTANCE, MARK, NEWEST_INSTANCE_VERSION, Probe
from caesura_metadata_conformance.rule import RuleBook, RuleBroken, expect, expect_status, need

METADATA = RuleBook("I", "instance metadata and the rest")
_IMDS = "instance-metadata-service.md"
_GUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

_DOCUMENTED = (
    "azEnvironment",
    "customData",
    "evictionPolicy",
    "isHostCompatibilityLayerVm",
    "licenseType",
    "location",
    "name",
    "offer",
    "osType",
    "placementGroupId",
    "platformFaultDomain",
    "platformSubFaultDomain",
    "platformUpdateDomain",
    "priority",
    "provider",
    "publicKeys",
    "publisher",
    "resourceGroupName",
    "resourceId",
    "sku",
    "subscriptionId",
    "tags",
    "tagsList",
    "userData",
    "version",
    "vmId",
    "vmScaleSetName",
    "vmSize",
    "zone",
    "physicalZone",
    "additionalCapabilities.hibernationEnabled",
    "extendedLocation.type",
    "extendedLocation.name",
    "osProfile.adminUsername",
    "osProfile.computerName",
    "osProfile.disablePasswordAuthentication",
    "plan.name",
    "plan.product",
    "plan.publisher",
    "securityProfile.secureBootEnabled",
    "securityProfile.virtualTpmEnabled",
    "securityProfile.encryptionAtHost",
    "securityProfile.securityType",
    "storageProfile.dataDisks",
    "storageProfile.imageReference.id",
    "storageProfile.osDisk.name",
    "storageProfile.resourceDisk.size",
    "virtualMachineScaleSet.id",
)


def _whole(probe: Probe, version: str = NEWEST_INSTANCE_VERSION) -> dict[str, Any]:
    reply = probe.get(INSTANCE, version=version)
    expect_status(reply, 200)
    tree = reply.json()
    expect(isinstance(tree, dict), "it is not an object")
    return dict(tree)


def _compute(probe: Probe, version: str = NEWEST_INSTANCE_VERSION) -> dict[str, Any]:
    compute = _whole(probe, version).get("compute")
    expect(isinstance(compute, dict), "compute is not an object")
    return dict(compute or {})


def _leaf(probe: Probe, path: str, version: str | None = None) -> Reply:
    return probe.get(f"{INSTANCE}/{path}", version=version, query="format=text")


@METADATA.rule("The instance has compute and network", _IMDS)
def _parts(probe: Probe) -> None:
    tree = _whole(probe)
    expect({"compute", "network"} <= set(tree), f"it has {sorted(tree)}")


@METADATA.rule("Every primitive of the instance is a string", _IMDS)
def _strings(probe: Probe) -> None:
    def look(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                look(child, f"{path}.{name}")
        elif isinstance(node, list):
            for number, child in enumerate(node):
                look(child, f"{path}.{number}")
        else:
            expect(isinstance(node, str), f"{path[1:]} is {node!r}")

    look(_whole(probe), "")


@METADATA.rule("Every documented element of compute is there, whatever its value", _IMDS)
def _documented(probe: Probe) -> None:
    compute = _compute(probe)
    missing = []
    for dotted in _DOCUMENTED:
        node: Any = compute
        for name in dotted.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is None:
            missing.append(dotted)
    expect(not missing, f"missing: {', '.join(missing)}")


@METADATA.rule("compute.name is there: events name VMs by it", "scheduled-events.md")
def _name(probe: Probe) -> None:
    expect(_compute(probe).get("name"), "it is empty")


@METADATA.rule("compute.vmId is a GUID", _IMDS)
def _vm_id(probe: Probe) -> None:
    value = _compute(probe).get("vmId")
    expect(isinstance(value, str) and _GUID.fullmatch(value), f"it is {value!r}")


@METADATA.rule("Update and fault domain are numbers in strings", _IMDS)
def _domains(probe: Probe) -> None:
    compute = _compute(probe)
    for name in ("platformUpdateDomain", "platformFaultDomain"):
        value = compute.get(name)
        expect(isinstance(value, str) and value.isdigit(), f"{name} is {value!r}")


@METADATA.rule("azEnvironment names a cloud", "SDKs choose their endpoints by it")
def _cloud(probe: Probe) -> None:
    value = str(_compute(probe).get("azEnvironment", ""))
    expect(value.lower().startswith("azure"), f"it is {value!r}")


@METADATA.rule("Elements appear with the api-version that brought them", _IMDS)
def _since(probe: Probe) -> None:
    for name, before, since in (
        ("tagsList", "2019-06-01", "2019-06-04"),
        ("userData", "2020-12-01", "2021-01-01"),
    ):
        expect(name not in _compute(probe, before), f"{name} is there with {before}")
        expect(name in _compute(probe, since), f"{name} is missing with {since}")


@METADATA.rule("tags and tagsList say the same", _IMDS)
def _tags(probe: Probe) -> None:
    compute = _compute(probe)
    pairs = compute.get("tagsList")
    expect(
        isinstance(pairs, list) and all(isinstance(each, dict) for each in pairs),
        f"tagsList is {pairs!r:.100}",
    )
    written = ";".join(f"{each.get('name')}:{each.get('value')}" for each in pairs or [])
    expect(compute.get("tags") == written, f"{compute.get('tags')!r} and {written!r}")


@METADATA.rule("The first interface has an address and a MAC of twelve hex digits", "WALinuxAgent")
def _interface(probe: Probe) -> None:
    try:
        interface = _whole(probe)["network"]["interface"][0]
        address, mac = interface["ipv4"]["ipAddress"][0]["privateIpAddress"], interface["macAddress"]
    except (KeyError, IndexError, TypeError) as error:
        raise RuleBroken(f"network.interface[0] lacks {error}") from error
    expect(address, "privateIpAddress is empty")
    expect(re.fullmatch(r"[0-9A-F]{12}", str(mac)), f"macAddress is {mac!r}")


@METADATA.rule("A part of the tree is what it is in the whole", _IMDS)
def _subtree(probe: Probe) -> None:
    reply = probe.get(f"{INSTANCE}/compute", version=NEWEST_INSTANCE_VERSION)
    expect_status(reply, 200)
    expect(reply.json() == _compute(probe), "compute differs")


@METADATA.rule("Arrays are indexed by number", _IMDS)
def _index(probe: Probe) -> None:
    expect_status(probe.get(f"{INSTANCE}/network/interface/0"), 200)


@METADATA.rule("A leaf as text is the bare value", "drainsafe")
def _text(probe: Probe) -> None:
    reply = _leaf(probe, "compute/name")
    expect_status(reply, 200)
    name = _compute(probe).get("name")
    expect(reply.text == name, f"{reply.text!r} instead of {name!r}")
    kind = reply.headers.get("content-type", "")
    expect(kind.startswith("text/plain"), f"Content-Type {kind!r}")


@METADATA.rule("A leaf as JSON is 400", _IMDS)
def _leaf_json(probe: Probe) -> None:
    expect_status(probe.get(f"{INSTANCE}/compute/name"), 400)


@METADATA.rule("A documented leaf without a value is empty, not 404", _IMDS)
def _empty_leaf(probe: Probe) -> None:
    for path in ("compute/customData", "compute/platformSubFaultDomain", "compute/plan/name"):
        expect_status(_leaf(probe, path, NEWEST_INSTANCE_VERSION), 200)


@METADATA.rule("An element that does not exist is 404", _IMDS)
def _404(probe: Probe) -> None:
    expect_status(_leaf(probe, "compute/nothing"), 404)


@METADATA.rule(
    "A VM without an identity gets 400 invalid_request, not 404", "azure-identity repeats a 404 for 24 s"
)
def _identity(probe: Probe) -> None:
    reply = probe.get(
        "/metadata/identity/oauth2/token", version="2018-02-01", query="resource=https://vault.azure.net"
    )
    need(reply.status != 200, "it has an identity")
    expect_status(reply, 400)
    body = reply.json()
    expect(
        isinstance(body, dict) and body.get("error") == "invalid_request", f"the body is {reply.text[:200]!r}"
    )
    expect(
        isinstance(body, dict) and isinstance(body.get("error_description"), str),
        "there is no error_description",
    )


@METADATA.rule("GET /metadata is 400 and names the newest versions", "probes of SDKs")
def _root(probe: Probe) -> None:
    reply = probe.get("/metadata", version="", headers=(MARK,))
    expect_status(reply, 400)
    body = reply.json()
    newest = body.get("newest-versions") if isinstance(body, dict) else None
    expect(isinstance(newest, list) and len(newest) == 3, f"newest-versions is {newest!r}")
