"""Settings of the metrics exporter, read from ``CAESURA_METRICS_EXPORTER_*``."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from caesura.contract.names import NAME_PATTERN
from caesura.runtime.settings import ServiceSettings

PageHost = Annotated[str, Meta(pattern=r"^(\*|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\Z")]
"""A name as in a Host header, without the port."""


class MetricsExporterSettings(ServiceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One exporter, for a fleet."""

    instance: Annotated[
        str,
        Meta(
            pattern=NAME_PATTERN,
            description="Name of this exporter; its session at the broker is bound to it.",
        ),
    ] = "exporter"
    listen: Annotated[
        str, Meta(description="`host:port` or `unix:/path` for /metrics, the live page, /live and /ready.")
    ] = "127.0.0.1:9310"
    page_hosts: Annotated[
        tuple[PageHost, ...],
        Meta(
            description='Host names without a port, as JSON (`["ops.example.com"]`), under which a browser may ask for '
            'the live page, besides IP addresses, names without a dot and this machine\'s own; `["*"]`: any.'
        ),
    ] = ()
