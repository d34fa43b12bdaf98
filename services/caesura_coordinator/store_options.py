"""Where the settings say that the store is. What only PostgreSQL needs is imported only for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from caesura.runtime.database import Database
from caesura.runtime.errors import ConfigError
from caesura.runtime.shared_rows import SharedRows, TableColumns, WrongStore, columns_of
from caesura_coordinator.settings import CoordinatorSettings
from caesura_coordinator.store import MIGRATIONS
from caesura_coordinator.takeover import LEFT_OUT

if TYPE_CHECKING:
    from caesura.runtime.postgresql_options import PostgresOptions


def tables_of(version: int) -> list[str]:
    """The shared tables of a version of the schema."""
    database = Database(":memory:", MIGRATIONS[:version])
    try:
        return list(columns_of(database, LEFT_OUT))
    finally:
        database.close()


class StoreSettingsError(ConfigError):
    """The settings of the store do not fit together."""


def is_shared(settings: CoordinatorSettings) -> bool:
    """Whether coordinators share the store."""
    return settings.store != "sqlite"


def shared_rows(
    settings: CoordinatorSettings, columns: Mapping[str, TableColumns]
) -> Callable[[], SharedRows]:
    """Makes connections to the database of the settings.

    Raises:
        StoreSettingsError: psycopg is not installed.
        WrongStore: the URL cannot be used.
    """
    options = _options(settings)
    from caesura.runtime.postgresql import PostgresRows  # noqa: PLC0415 - see the module

    return lambda: PostgresRows(options, columns, len(MIGRATIONS), tables_of)


def check_store(settings: CoordinatorSettings) -> None:
    """Check before anything starts that the settings name a store.

    Raises:
        ConfigError: they do not; the text says what to change.
    """
    if is_shared(settings):
        try:
            _options(settings)
        except WrongStore as error:
            raise StoreSettingsError(f"CAESURA_COORDINATOR_STORE: {error}") from error
    elif settings.store_password or settings.store_ca_file:
        raise StoreSettingsError(
            "CAESURA_COORDINATOR_STORE_PASSWORD_FILE and _CA_FILE are for a store in PostgreSQL: set CAESURA_COORDINATOR_STORE, or unset them"
        )


def _options(settings: CoordinatorSettings) -> PostgresOptions:
    try:
        from caesura.runtime.postgresql_options import PostgresOptions  # noqa: PLC0415 - see the module
    except ImportError as error:
        raise StoreSettingsError(
            f"a store in PostgreSQL needs psycopg ({error}): install caesura[postgresql]"
        ) from error
    return PostgresOptions(
        url=settings.store,
        password=settings.store_password,
        ca_file=settings.store_ca_file,
        fleet=settings.fleet,
        name=settings.instance,
        lease_s=settings.lease_s,
    )
