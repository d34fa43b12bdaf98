"""What the operator says of a VM for its workloads to read: the part of the instance metadata that no driver knows."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from caesura.contract.envelope import Message
from caesura.contract.messages.fields import Record
from caesura.contract.names import Name

ShortText = Annotated[str, Meta(max_length=512)]
MacAddress = Annotated[
    str,
    Meta(pattern=r"^([0-9A-Fa-f]{2}([:-]?[0-9A-Fa-f]{2}){5})?\Z", description="48 bits in hex, or empty."),
]

MOST_USER_DATA_BYTES = 64 * 1024
"""Of the Base64 text, as on Azure ("User data for Azure virtual machine")."""


class VmImage(Record, frozen=True, kw_only=True):
    """What a VM was made from."""

    publisher: ShortText = ""
    offer: ShortText = ""
    sku: ShortText = ""
    version: ShortText = ""
    id: ShortText = ""


class VmInterface(Record, frozen=True, kw_only=True):
    """A network interface as the workloads of a VM know it."""

    mac: MacAddress = ""
    ipv4: ShortText = ""
    """With its prefix: ``10.0.0.4/24``."""
    public_ipv4: ShortText = ""
    ipv6: ShortText = ""


class VmPublicKey(Record, frozen=True, kw_only=True):
    """A key that may log in."""

    path: ShortText = ""
    key: Annotated[str, Meta(max_length=16384)]


class VmDetails(Message, frozen=True, kw_only=True):
    """What the host file says of a VM in `[vm.details]`. Retained; removed when it says nothing any more."""

    TYPE: ClassVar[str] = "caesura.vm.details.v1"

    vm: Name
    host: Name
    size: ShortText = ""
    image: VmImage = VmImage()
    os_type: Literal["Linux", "Windows"] = "Linux"
    zone: ShortText = ""
    physical_zone: ShortText = ""
    tags: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=512)], ShortText], Meta(max_length=50)
    ] = {}  # noqa: RUF012 - msgspec gives each its own
    interfaces: Annotated[tuple[VmInterface, ...], Meta(max_length=32)] = ()
    scale_set: ShortText = ""
    computer_name: ShortText = ""
    admin_username: ShortText = ""
    public_keys: Annotated[tuple[VmPublicKey, ...], Meta(max_length=8)] = ()
    priority: ShortText = ""
    eviction_policy: ShortText = ""
    license_type: ShortText = ""
    user_data: Annotated[str, Meta(max_length=MOST_USER_DATA_BYTES, description="Base64.")] = ""
