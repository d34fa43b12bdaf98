"""Settings of the operator's command (prefix ``CAESURA_CTL_``)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from caesura.runtime.settings import ServiceSettings


class CtlSettings(ServiceSettings, frozen=True, kw_only=True):
    """How the command reaches the bus, and its identity there."""

    client: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]{0,40}\Z",
            description="Name under which requests are made; empty: the login name.",
        ),
    ] = ""
