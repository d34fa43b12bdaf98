"""The documented tree of ``/metadata/instance``, by api-version, for one VM. Pure.

Source: the schema tables and example responses of instance-metadata-service.md (azure-compute-docs, 2026). In JSON every
primitive is a string. What is missing or does not apply is there all the same, as ``""``, or as an empty list where the element
is a list: a documented path is never 404 from the api-version on that brought it. Which of ``""`` and ``"false"`` a flag has that
does not apply is documented for none of them; the examples have ``"false"``, and so have we.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from uuid import UUID, uuid5

import msgspec

from caesura.contract.messages import VmDetails, VmInterface
from caesura.fleet.state import LocatedVm

_NAMESPACE = UUID(
    "2ee8ea4e-2b66-5b4f-9f0b-6d5d3a7c9f10"
)  # random, once; stable ids of VMs and sets depend on it

_MADE_UP = ipaddress.IPv4Network("198.18.0.0/15")
"""Reserved for benchmarks (RFC 2544): such an address belongs to nobody, so it is not mistaken for one that answers."""

Tree = str | Mapping[str, "Tree"] | Sequence["Tree"]


class Since(msgspec.Struct, frozen=True):
    """An element that an api-version brought. What is not marked is there in all, 2017-03-01 included, of which no field is documented."""

    version: str
    value: Marked


Marked = Since | str | Mapping[str, "Marked"] | Sequence["Marked"]
"""A tree whose elements may say since which api-version they are there."""


class InstanceLocation(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's description of where the VMs are; shown to workloads as it is."""

    location: str = "local"
    resource_group: str = "caesura"
    subscription: str = "00000000-0000-0000-0000-000000000000"
    environment: str = "AzurePublicCloud"


def vm_id(vm: str) -> str:
    """The stable GUID of a VM, derived from its name."""
    return str(uuid5(_NAMESPACE, f"vm/{vm}"))


def instance_tree(
    located: LocatedVm, details: VmDetails | None, version: str, place: InstanceLocation
) -> Mapping[str, Tree]:
    """Everything under ``/metadata/instance`` for this VM at this api-version.

    Args:
        details: what its host file says of it; None if nothing.
    """
    known = details if details is not None else VmDetails(vm=located.record.vm, host=located.host)
    marked: Marked = {"compute": _compute(located, known, place), "network": _network(known)}
    tree = _at(marked, version)
    assert isinstance(tree, Mapping)  # noqa: S101 - for mypy
    return tree


def _at(element: Marked, version: str) -> Tree | None:
    """The element as this api-version has it, None if it does not have it."""
    match element:
        case Since():
            return _at(element.value, version) if version >= element.version else None
        case str():
            return element
        case Mapping():
            found = ((name, _at(child, version)) for name, child in element.items())
            return {name: child for name, child in found if child is not None}
        case _:
            children = (_at(child, version) for child in element)
            return [child for child in children if child is not None]


def _compute(located: LocatedVm, details: VmDetails, place: InstanceLocation) -> Marked:
    record, vm, image = located.record, located.record.vm, details.image
    in_a_set = not record.set.startswith("_")
    group = f"/subscriptions/{place.subscription}/resourceGroups/{place.resource_group}/providers/Microsoft.Compute"
    tags = {
        **details.tags,
        "caesura_host": located.host,
        **({"caesura_set": record.set} if in_a_set else {}),
    }
    scale_set = f"{group}/virtualMachineScaleSets/{details.scale_set}" if details.scale_set else ""
    return {
        "additionalCapabilities": Since("2021-11-01", {"hibernationEnabled": "false"}),
        "azEnvironment": Since("2018-10-01", place.environment),
        # "Deprecated and disabled in IMDS": the element is there, and always empty.
        "customData": Since("2019-02-01", ""),
        "evictionPolicy": Since("2020-12-01", details.eviction_policy),
        "extendedLocation": Since("2021-03-01", {"name": "", "type": ""}),
        "host": Since(
            "2021-11-15", {"id": f"{group}/hostGroups/{place.resource_group}/hosts/{located.host}"}
        ),
        # "A VM will either have a host or a hostGroup but not both."
        "hostGroup": Since("2021-11-15", {"id": ""}),
        "isHostCompatibilityLayerVm": Since("2020-06-01", "false"),
        "licenseType": Since("2020-09-01", details.license_type),
        "location": place.location,
        "name": vm,
        "offer": image.offer,
        "osProfile": Since(
            "2020-07-15",
            {
                "adminUsername": details.admin_username,
                "computerName": details.computer_name or vm,
                "disablePasswordAuthentication": Since(
                    "2020-10-01", "true" if details.public_keys else "false"
                ),
            },
        ),
        "osType": details.os_type,
        "physicalZone": Since("2023-11-15", details.physical_zone),
        # The placement group is the scope in which Azure delivers events: here, the set.
        "placementGroupId": Since(
            "2017-08-01", str(uuid5(_NAMESPACE, f"set/{record.set}")) if in_a_set else ""
        ),
        "plan": Since("2018-04-02", {"name": "", "product": "", "publisher": ""}),
        "platformFaultDomain": str(record.fault_domain),
        "platformSubFaultDomain": Since("2021-10-01", ""),
        "platformUpdateDomain": str(record.update_domain),
        "priority": Since("2020-12-01", details.priority),
        "provider": Since("2018-10-01", "Microsoft.Compute"),
        "publicKeys": Since(
            "2018-04-02", [{"keyData": key.key, "path": key.path} for key in details.public_keys]
        ),
        "publisher": image.publisher,
        "resourceGroupName": Since("2017-08-01", place.resource_group),
        "resourceId": Since("2019-03-11", f"{group}/virtualMachines/{vm}"),
        "securityProfile": Since(
            "2020-06-01",
            {
                "encryptionAtHost": Since("2021-11-01", "false"),
                "secureBootEnabled": "false",
                "securityType": Since("2021-12-13", ""),
                "virtualTpmEnabled": "false",
            },
        ),
        "sku": image.sku,
        "storageProfile": Since("2019-06-01", _storage(details)),
        "subscriptionId": Since("2017-08-01", place.subscription),
        "tags": Since("2017-08-01", ";".join(f"{name}:{value}" for name, value in tags.items())),
        "tagsList": Since("2019-06-04", [{"name": name, "value": value} for name, value in tags.items()]),
        "userData": Since("2021-01-01", details.user_data),
        "version": image.version,
        "virtualMachineScaleSet": Since("2021-03-01", {"id": scale_set}),
        "vmId": vm_id(vm),
        "vmScaleSetName": Since("2017-12-01", details.scale_set),
        "vmSize": details.size,
        "zone": Since("2017-12-01", details.zone),
    }


def _storage(details: VmDetails) -> Marked:
    image = details.image
    return {
        # Disks are the hypervisor's business: none is described, and a path into the list is 404 as on a VM without data disks.
        "dataDisks": [],
        "imageReference": {
            "communityGalleryImageId": Since("2023-07-01", ""),
            "exactVersion": Since("2023-07-01", ""),
            "id": image.id,
            "offer": image.offer,
            "publisher": image.publisher,
            "sharedGalleryImageId": Since("2023-07-01", ""),
            "sku": image.sku,
            "version": image.version,
        },
        "osDisk": {
            "caching": "",
            "createOption": "",
            "diffDiskSettings": {"option": ""},
            "diskSizeGB": "",
            "encryptionSettings": {
                "diskEncryptionKey": Since("2021-11-01", {"secretUrl": "", "sourceVault": {"id": ""}}),
                "enabled": "false",
                "keyEncryptionKey": Since("2021-11-01", {"keyUrl": "", "sourceVault": {"id": ""}}),
            },
            "image": {"uri": ""},
            "managedDisk": {"id": "", "storageAccountType": ""},
            "name": "",
            "osType": details.os_type,
            "vhd": {"uri": ""},
            "writeAcceleratorEnabled": "false",
        },
        # "If there's no local temp disk for the VM, this value is 0."
        "resourceDisk": Since("2021-02-01", {"size": "0"}),
    }


def _network(details: VmDetails) -> Marked:
    interfaces = details.interfaces or (VmInterface(),)
    return {"interface": [_interface(details.vm, number, each) for number, each in enumerate(interfaces)]}


def _interface(vm: str, number: int, interface: VmInterface) -> Marked:
    stable = uuid5(_NAMESPACE, f"vm/{vm}" if number == 0 else f"vm/{vm}/interface/{number}")
    own = _ipv4(interface.ipv4)
    if own is None and not interface.ipv6:
        # Agents (WALinuxAgent) take a VM without an address for a broken one. The listener's own would be worse than one that is
        # nobody's: it is the same for many VMs, or an address on the host.
        own = ipaddress.IPv4Interface((_MADE_UP[1 + stable.int % (_MADE_UP.num_addresses - 2)], 15))
    addresses: list[Marked] = []
    subnets: list[Marked] = []
    if own is not None:
        addresses.append({"privateIpAddress": str(own.ip), "publicIpAddress": interface.public_ipv4})
        subnets.append({"address": str(own.network.network_address), "prefix": str(own.network.prefixlen)})
    return {
        "ipv4": {"ipAddress": addresses, "subnet": subnets},
        "ipv6": {"ipAddress": [{"privateIpAddress": interface.ipv6}] if interface.ipv6 else []},
        # Without one from the host file: locally administered (second hex digit 2), and stable like the VM's id.
        "macAddress": (interface.mac or f"02{stable.hex[:10]}").replace(":", "").replace("-", "").upper(),
    }


def _ipv4(written: str) -> ipaddress.IPv4Interface | None:
    try:
        return ipaddress.IPv4Interface(written) if written else None
    except ValueError:  # the host updater checks its file; this is for messages of others
        return None
