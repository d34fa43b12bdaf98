"""Settings of the coordinator (prefix ``CAESURA_COORDINATOR_``)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from caesura.contract.names import Name
from caesura.runtime.settings import Secret, ServiceSettings


class CoordinatorSettings(ServiceSettings, frozen=True, kw_only=True):
    """The settings of the coordinator in addition to the broker's."""

    state_dir: Annotated[
        str,
        Meta(
            min_length=1,
            description="Folder of the SQLite store, or with PostgreSQL only of a lock; created with mode 0700. One coordinator uses it at a time.",
        ),
    ]
    instance: Annotated[
        Name, Meta(description="Its name on the bus; a standby coordinator needs another one.")
    ] = "coordinator"
    store: Annotated[
        str,
        Meta(
            pattern=r"^(sqlite|postgres(ql)?://.*)\Z",
            description="`sqlite`: a file in the state folder. `postgresql://user@host/database`: shared by several coordinators, of which one leads.",
        ),
    ] = "sqlite"
    store_password: Annotated[
        Secret, Meta(description="Password at the PostgreSQL store, read from the file named here.")
    ] = msgspec.field(default_factory=Secret)
    store_ca_file: Annotated[
        str,
        Meta(
            description="CA certificates (PEM) to check the PostgreSQL server against; empty: those of the system."
        ),
    ] = ""
    lease_s: Annotated[
        float,
        Meta(
            ge=1,
            le=300,
            description="With a PostgreSQL store: seconds after which a leader that does not reach the store, or has no broker, is replaced.",
        ),
    ] = 10.0
    settle_s: Annotated[
        float, Meta(ge=0, le=60, description="Seconds to listen to the hosts before the epoch is claimed.")
    ] = 1.0
    health_listen: Annotated[
        str,
        Meta(
            description="`host:port` or `unix:/path` for /live, /ready and /metrics; empty for no listener."
        ),
    ] = "127.0.0.1:9311"
