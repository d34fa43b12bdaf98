"""How a session with PostgreSQL is opened: its URL, its time limits, TLS. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict

from caesura.runtime.settings import Secret
from caesura.runtime.shared_rows import WrongStore

_LEAST_CONNECT_S = 2
"""s: libpq makes two of one second."""
_REFUSED = ("password", "passfile", "service", "servicefile", "sslpassword")
"""Parameters of the URL that would hold a secret, or take the connection elsewhere than the URL says."""


class PostgresOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the database.

    Raises:
        WrongStore: the URL cannot be used; the text says why.
    """

    url: str
    """``postgresql://user@host/database``; several hosts are separated by commas."""
    password: Secret = msgspec.field(default_factory=Secret)
    ca_file: str = ""
    """CA certificates (PEM) of the server; empty: those of the system."""
    fleet: str
    name: str
    """Of this process, as the server shows it."""
    lease_s: float
    """Seconds of silence after which a session is ended."""

    def __post_init__(self) -> None:
        self.parameters()

    def parameters(self) -> dict[str, Any]:
        """What libpq is called with, without the password (https://www.postgresql.org/docs/current/libpq-connect.html)."""
        try:
            given = conninfo_to_dict(self.url)
        except psycopg.ProgrammingError:
            # What libpq says of it quotes it, and a password may be in it.
            raise WrongStore(
                "the store's URL cannot be read, as a character that needs %XX or a parameter that does not exist: write "
                "postgresql://user@host/database"
            ) from None
        for each in _REFUSED:
            if each in given:
                raise WrongStore(
                    f"the store's URL must not have {each}: the password comes from the file that CAESURA_COORDINATOR_STORE_PASSWORD_FILE names"
                )
        ports = str(given.get("port") or "").split(",")
        if not all(each == "" or (each.isascii() and each.isdigit()) for each in ports):
            raise WrongStore(
                "the store's URL has a port that is not a number: write postgresql://user@host:5432/database, without a password"
            )
        if "@" in str(given.get("dbname") or ""):
            raise WrongStore(
                "the store's URL has an @ in the name of the database: write postgresql://user@host/database, without a password"
            )
        if not given.get("dbname"):
            raise WrongStore("the store's URL names no database: write postgresql://user@host/database")
        if not given.get("host") and not given.get("hostaddr"):
            raise WrongStore(
                "the store's URL names no host: write postgresql://user@host/database, or for a unix socket ...?host=/var/run/postgresql"
            )
        milliseconds = round(self.lease_s * 1000)
        settings = {
            "statement_timeout": milliseconds,
            "lock_timeout": milliseconds,
            "idle_session_timeout": milliseconds,
            "idle_in_transaction_session_timeout": milliseconds,
            "tcp_user_timeout": milliseconds,
            "tcp_keepalives_idle": max(1, round(self.lease_s / 3)),
            "tcp_keepalives_interval": max(1, round(self.lease_s / 3)),
            "tcp_keepalives_count": 2,
        }
        made = {
            "connect_timeout": self._connect_timeout_s(given),
            "tcp_user_timeout": milliseconds,
            "keepalives_idle": max(1, round(self.lease_s / 3)),
            "keepalives_interval": max(1, round(self.lease_s / 3)),
            "keepalives_count": 2,
            # Of several servers, the one that takes writes.
            "target_session_attrs": "read-write",
            "application_name": f"caesura-coordinator {self.name}"[:63],
            **self._tls(given),
            **{name: value for name, value in given.items() if name != "options"},
        }
        more = " ".join(f"-c {name}={value}" for name, value in settings.items())
        return {**made, "options": f"{given.get('options', '')} {more}".strip()}

    def _connect_timeout_s(self, given: Mapping[str, Any]) -> int:
        """For each host, so that all of them are tried within one lease."""
        hosts = len(_hosts(given))
        each_s = max(_LEAST_CONNECT_S, int(self.lease_s / (hosts + 1)))
        if hosts > 1 and hosts * each_s >= self.lease_s:
            raise WrongStore(
                f"a lease of {self.lease_s:g} s is too short for the {hosts} hosts in the store's URL: the last one would not be tried if the others are "
                f"silent. Set CAESURA_COORDINATOR_LEASE_S to more than {hosts * _LEAST_CONNECT_S}, or name fewer"
            )
        return each_s

    def _tls(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Over a network the server is checked, unless the URL says otherwise."""
        mode = given.get("sslmode")
        hosts = _hosts(given)
        if self.ca_file and mode in {"disable", "allow", "prefer"}:
            raise WrongStore(f"a CA file is set but the store's URL says sslmode={mode}: remove one of them")
        if mode is None and not self.ca_file and all(_is_local(each) for each in hosts):
            return {}
        made: dict[str, Any] = {"sslmode": mode or "verify-full"}
        if made["sslmode"] in {"verify-full", "verify-ca"} or self.ca_file:
            made["sslrootcert"] = self.ca_file or "system"
        return made

    @property
    def label(self) -> str:
        """The database, for people: with the ports that the URL names, since a machine may have two servers."""
        given = self.parameters()
        hosts = str(given.get("host") or given.get("hostaddr")).split(",")
        ports = str(given.get("port") or "").split(",")
        ports = ports * len(hosts) if len(ports) == 1 else ports
        where = ",".join(_address(host, port) for host, port in zip_longest(hosts, ports, fillvalue=""))
        return f"postgresql://{where}/{given['dbname']}"


def advice(why: str) -> str:
    """What to do about an error of libpq that does not say it; empty: it does, or nobody knows."""
    if "password authentication failed" in why:
        return "Is it the password of that role? CAESURA_COORDINATOR_STORE_PASSWORD_FILE is read at the start"
    if "no password supplied" in why:
        return "Set CAESURA_COORDINATOR_STORE_PASSWORD_FILE to the file with the password"
    return ""


def _address(host: str, port: str) -> str:
    if ":" in host:
        host = f"[{host}]"
    return f"{host}:{port}" if port else host


def _hosts(given: Mapping[str, Any]) -> list[str]:
    return str(given.get("hostaddr") or given.get("host")).split(",")


def _is_local(host: str) -> bool:
    """Whether it is a unix socket or this machine."""
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
