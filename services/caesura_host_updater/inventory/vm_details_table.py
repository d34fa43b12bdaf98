"""The table ``[vm.details]`` of the host file: what the workloads of a VM read about it. Pure."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta

from caesura.contract.messages import MOST_USER_DATA_BYTES, VmDetails, VmImage, VmInterface, VmPublicKey
from caesura.contract.messages.vm_details import ShortText


class ImageTable(VmImage, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[vm.details.image]``."""


class InterfaceTable(VmInterface, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[vm.details.interface]]``."""


class PublicKeyTable(VmPublicKey, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[vm.details.public_key]]``."""


class VmDetailsTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys that an operator may set; all of them may be left out."""

    size: ShortText = ""
    image: ImageTable = ImageTable()
    os_type: str = "Linux"
    zone: ShortText = ""
    physical_zone: ShortText = ""
    tags: dict[str, str] = {}
    interface: tuple[InterfaceTable, ...] = ()
    scale_set: ShortText = ""
    computer_name: ShortText = ""
    admin_username: ShortText = ""
    public_key: tuple[PublicKeyTable, ...] = ()
    priority: ShortText = ""
    eviction_policy: ShortText = ""
    license_type: ShortText = ""
    user_data: Annotated[str, Meta(max_length=MOST_USER_DATA_BYTES)] = ""
    """As text; workloads read it Base64-encoded, as on Azure."""
    user_data_base64: Annotated[str, Meta(max_length=MOST_USER_DATA_BYTES)] = ""
    """The same for what is not text."""

    def message(self, vm: str, host: str) -> VmDetails:
        """What is published.

        Raises:
            msgspec.ValidationError: a value is not as the contract wants it; ``details_error`` names it before.
        """
        own = msgspec.to_builtins(self)
        user_data = own.pop("user_data")
        encoded = own.pop("user_data_base64") or base64.b64encode(user_data.encode()).decode()
        interfaces, public_keys = own.pop("interface"), own.pop("public_key")
        return msgspec.convert(
            {
                **own,
                "vm": vm,
                "host": host,
                "interfaces": interfaces,
                "public_keys": public_keys,
                "user_data": encoded,
            },
            VmDetails,
        )


def details_error(details: VmDetailsTable) -> str:
    """What is wrong with the table beyond its types, behind the VM's name; empty: nothing."""
    where = "[vm.details]"
    if details.user_data and details.user_data_base64:
        return f"{where} has both user_data and user_data_base64"
    try:
        base64.b64decode(details.user_data_base64, validate=True)
    except binascii.Error as error:
        return f"{where} has a user_data_base64 that is not Base64: {error}"
    for name, value in details.tags.items():
        if ";" in name + value or ":" in name:
            return f"{where} has the tag {name!r}: a name has no colon, and neither has a semicolon"
    for interface in details.interface:
        if wrong := _address_error(interface):
            return f"{where} {wrong}"
    try:
        details.message("vm", "host")
    except msgspec.ValidationError as error:
        return f"{where}: {error}"
    return ""


def _address_error(interface: InterfaceTable) -> str:
    try:
        if interface.ipv4:
            ipaddress.IPv4Interface(interface.ipv4)
            if "/" not in interface.ipv4:
                return f"has the ipv4 {interface.ipv4!r} without its prefix: write {interface.ipv4}/24"
        if interface.public_ipv4:
            ipaddress.IPv4Address(interface.public_ipv4)
        if interface.ipv6:
            ipaddress.IPv6Address(interface.ipv6)
    except ValueError as error:
        return f"has an interface with a wrong address: {error}"
    return ""
