"""Settings of the metadata publisher, read from ``CAESURA_METADATA_PUBLISHER_*``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from caesura.contract.names import NAME_PATTERN
from caesura.runtime.settings import ServiceSettings
from caesura_metadata_publisher.instance_fields import InstanceLocation

HttpHost = Annotated[str, Meta(pattern=r"^(\*|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\Z")]


class MetadataPublisherSettings(ServiceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One publisher, for the VMs of its listeners file."""

    instance: Annotated[
        str, Meta(pattern=NAME_PATTERN, description="Name of this publisher on the bus; unique in the fleet.")
    ] = "metadata"
    listeners_file: Annotated[
        str,
        Meta(
            description='TOML file: `[[listener]]` with `vm = "web-1"` and `listen = "127.0.0.1:8101"` or `"unix:/path"`.'
        ),
    ]
    health_listen: Annotated[
        str,
        Meta(
            description="`host:port` or `unix:/path` for /live, /ready and /metrics; empty for no listener."
        ),
    ] = "127.0.0.1:9313"
    http_hosts: Annotated[
        tuple[HttpHost, ...],
        Meta(
            description="Names under which VMs ask, besides addresses and names without a dot; `*` allows all. Others are refused: "
            "a web site could have its own name point here (DNS rebinding)."
        ),
    ] = ()
    approval_timeout_s: Annotated[
        float,
        Meta(gt=0, description="Seconds an approval may wait for the bus before it is answered with 500."),
    ] = 0.8
    approval_repeat_s: Annotated[
        float,
        Meta(gt=0, description="Seconds between repetitions of an approval until the document shows it."),
    ] = 1.0
    fidelity: Annotated[
        Literal["relaxed", "strict"],
        Meta(
            description="`strict`: limits of the real service as well: 5 requests a second and VM, then 429; the first call of a set "
            "for events is answered late, again after 24 h without a call."
        ),
    ] = "relaxed"
    first_answer_s: Annotated[
        float, Meta(ge=0, le=120, description="Seconds that the first answer takes with `fidelity` `strict`.")
    ] = 60.0
    location: Annotated[str, Meta(description="Shown as compute.location.")] = "local"
    resource_group: Annotated[str, Meta(description="Shown as compute.resourceGroupName.")] = "caesura"
    subscription: Annotated[str, Meta(description="Shown as compute.subscriptionId.")] = (
        "00000000-0000-0000-0000-000000000000"
    )

    environment: Annotated[str, Meta(description="Shown as compute.azEnvironment.")] = "AzurePublicCloud"

    @property
    def place(self) -> InstanceLocation:
        """The operator's description of where the VMs are."""
        return InstanceLocation(
            location=self.location,
            resource_group=self.resource_group,
            subscription=self.subscription,
            environment=self.environment,
        )
