"""Every environment variable of Caesura. Any other name that starts with ``CAESURA_`` is a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable

PREFIX = "CAESURA_"
SETTINGS = tuple(
    f"{PREFIX}{name}_"
    for name in (
        "COORDINATOR",
        "CTL",
        "HOST_UPDATER",
        "METADATA_PUBLISHER",
        "METRICS_EXPORTER",
        "VM_AGENT",
    )
)
"""The prefix of each service's settings. Only the service itself knows its settings."""
MARKERS = (f"{PREFIX}DEMO_", f"{PREFIX}DOCTOR_", f"{PREFIX}TEST_")
"""Set by demo, doctor and tests in everything they start, to find it again."""
RESERVED = frozenset(
    PREFIX + name
    for name in (
        # to updates, hooks and the processes of a VM; our own commands among these inherit them
        "EVENT_ID",
        "EVENT_TYPE",
        "HOST",
        "METADATA_URL",
        "NOT_BEFORE",
        "OPERATION",
        "PAUSE_S",
        "PORT",
        "QEMU",
        "SET",
        "UPDATE",
        "UPDATE_DOMAIN",
        "VM",
        "VM_RAM",
        # to docker compose, Grafana and the soak test
        "IMAGE",
        "PORT_BROKER",
        "PORT_EXPORTER",
        "PORT_GRAFANA",
        "PORT_PROMETHEUS",
        "PROMETHEUS_URL",
        "ROLLOUTS",
        "ROLLOUT_PAUSE",
        "SOAK_FAULTS",
        "SOAK_S",
        "SOAK_SEED",
    )
)
"""Variables that are not settings of a service."""


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that look like a Caesura variable but are not one, in order."""
    return sorted(
        name
        for name in names
        if name.startswith(PREFIX) and not name.startswith((*SETTINGS, *MARKERS)) and name not in RESERVED
    )
