"""Instance metadata: the tree of ``/metadata/instance`` for one VM, and the walk into it. Pure.

Wire facts: instance-metadata-service.md of azure-compute-docs. In JSON every primitive is a string, values
that do not apply are present as ``""``; a leaf needs ``format=text``. Each field appears from the api-version
that brought it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal
from uuid import UUID, uuid5

import msgspec

from caesura.fleet.state import LocatedVm
from caesura_metadata_publisher.request import HttpResponse, bad_request, not_found

_NAMESPACE = UUID(
    "2ee8ea4e-2b66-5b4f-9f0b-6d5d3a7c9f10"
)  # random, once; stable ids of VMs and sets depend on it

Tree = str | Mapping[str, "Tree"] | Sequence["Tree"]


class InstanceLocation(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's description of where the VMs are; shown to workloads as it is."""

    location: str = "local"
    resource_group: str = "caesura"
    subscription: str = "00000000-0000-0000-0000-000000000000"
    vm_size: str = ""


def vm_id(vm: str) -> str:
    """The stable GUID of a VM, derived from its name."""
    return str(uuid5(_NAMESPACE, f"vm/{vm}"))


def instance_tree(
    located: LocatedVm, version: str, place: InstanceLocation, address: str
) -> Mapping[str, Tree]:
    """Everything under ``/metadata/instance`` for this VM at this api-version.

    Args:
        address: the IPv4 address shown as the VM's private one.
    """
    return {"compute": _compute(located, version, place), "network": _network(located.record.vm, address)}


def answer_instance(
    tree: Mapping[str, Tree], path: Sequence[str], form: Literal["json", "text"]
) -> HttpResponse:
    """The element at ``path``, as JSON or text."""
    element: Tree = tree
    for segment in path:
        found = _child(element, segment)
        if found is None:
            return not_found()
        element = found
    if form == "json":
        if isinstance(element, str):
            return bad_request("This element is a leaf: ask for it with format=text.")
        return HttpResponse(status=200, body=msgspec.json.encode(element))
    text = element if isinstance(element, str) else "\n".join(_listing(element))
    return HttpResponse(status=200, body=text.encode(), content_type="text/plain; charset=utf-8")


def _child(element: Tree, segment: str) -> Tree | None:
    if isinstance(element, str):
        return None
    if isinstance(element, Mapping):
        return element.get(segment)
    if segment.isascii() and segment.isdigit() and int(segment) < len(element):
        return element[int(segment)]
    return None


def _listing(element: Mapping[str, Tree] | Sequence[Tree]) -> list[str]:
    # As the service lists a directory: names of elements with children end in a slash.
    pairs = element.items() if isinstance(element, Mapping) else ((str(i), e) for i, e in enumerate(element))
    return [name if isinstance(child, str) else f"{name}/" for name, child in pairs]


def _compute(located: LocatedVm, version: str, place: InstanceLocation) -> Mapping[str, Tree]:
    record, vm = located.record, located.record.vm
    in_a_set = not record.set.startswith("_")
    group = f"/subscriptions/{place.subscription}/resourceGroups/{place.resource_group}/providers/Microsoft.Compute"
    tags = {"caesura_host": located.host} | ({"caesura_set": record.set} if in_a_set else {})
    fields: tuple[tuple[str, Tree, str], ...] = (
        ("azEnvironment", "", "2018-10-01"),
        ("evictionPolicy", "", "2020-12-01"),
        ("host", {"id": f"{group}/hostGroups/{place.resource_group}/hosts/{located.host}"}, "2021-11-15"),
        ("location", place.location, "2017-04-02"),
        ("name", vm, "2017-04-02"),
        ("offer", "", "2017-04-02"),
        ("osProfile", {"adminUsername": "", "computerName": vm}, "2020-07-15"),
        ("osType", "Linux", "2017-04-02"),
        # The placement group is the scope in which Azure delivers events: here, the set.
        ("placementGroupId", str(uuid5(_NAMESPACE, f"set/{record.set}")) if in_a_set else "", "2017-08-01"),
        ("platformFaultDomain", str(record.fault_domain), "2017-04-02"),
        ("platformUpdateDomain", str(record.update_domain), "2017-04-02"),
        ("priority", "", "2020-12-01"),
        ("provider", "Microsoft.Compute", "2018-10-01"),
        ("publisher", "", "2017-04-02"),
        ("resourceGroupName", place.resource_group, "2017-08-01"),
        ("resourceId", f"{group}/virtualMachines/{vm}", "2019-03-11"),
        ("sku", "", "2017-04-02"),
        ("subscriptionId", place.subscription, "2017-08-01"),
        ("tags", ";".join(f"{name}:{value}" for name, value in tags.items()), "2017-08-01"),
        ("tagsList", [{"name": name, "value": value} for name, value in tags.items()], "2019-06-04"),
        ("version", "", "2017-04-02"),
        ("vmId", vm_id(vm), "2017-04-02"),
        ("vmScaleSetName", "", "2017-12-01"),
        ("vmSize", place.vm_size, "2017-04-02"),
        ("zone", "", "2017-12-01"),
    )
    return {name: value for name, value, since in fields if version >= since or since == "2017-04-02"}


def _network(vm: str, address: str) -> Mapping[str, Tree]:
    # A locally administered address (second hex digit 2), stable like the VM's id. WALinuxAgent needs one.
    mac = f"02{vm_id(vm).replace('-', '')[:10]}".upper()
    return {
        "interface": [
            {
                "ipv4": {
                    "ipAddress": [{"privateIpAddress": address, "publicIpAddress": ""}],
                    "subnet": [{"address": address, "prefix": "32"}],
                },
                "ipv6": {"ipAddress": []},
                "macAddress": mac,
            }
        ]
    }
