"""Settings of the host updater; variables start with ``CAESURA_HOST_UPDATER_``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from caesura.runtime.settings import ServiceSettings


class HostUpdaterSettings(ServiceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See each description."""

    host_file: Annotated[str, Meta(description="TOML file with this host's name, driver and VMs.")]
    state_dir: Annotated[
        str, Meta(description="Folder (0700) for the journal, the guard's intent and the VMs' run files.")
    ] = "/var/lib/caesura/host-updater"
    updates_dir: Annotated[
        str, Meta(description="Folder with one `*.toml` for each update this host knows.")
    ] = "/etc/caesura/updates.d"
    guard: Annotated[
        Literal["spawn", "external"],
        Meta(
            description="`spawn`: start the pause guard; `external`: its own unit runs it on the same state dir."
        ),
    ] = "spawn"
    clock_timeout_s: Annotated[
        float,
        Meta(gt=0, description="Seconds after a VM's resume was announced until it is flagged as unsynced."),
    ] = 10.0
    max_digest_bytes: Annotated[
        int, Meta(ge=0, description="VM memory files above this are not digested during a pause.")
    ] = 64 * 1024 * 1024
    inventory_interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between two publications of an unchanged inventory.")
    ] = 20.0
    stop_vms_on_exit: Annotated[
        bool,
        Meta(description="Stop the VMs when the host updater is stopped; otherwise they continue to run."),
    ] = False
    drain_timeout_s: Annotated[
        float,
        Meta(gt=30, description="Seconds to finish or undo work when stopped; above the pause budget."),
    ] = 45.0
    health_listen: Annotated[
        str,
        Meta(
            description="`host:port` or `unix:/path` for /live, /ready and /metrics; empty for no listener."
        ),
    ] = "127.0.0.1:9312"
