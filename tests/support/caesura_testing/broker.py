"""Real brokers for tests: Mosquitto with users, access rules and TLS on a free port, or the embedded one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from caesura.bus.local_broker import (
    MEMORY_LIMIT_BYTES,
    LocalBroker,
    find_mosquitto,
    free_port,
    mosquitto_config,
    password_line,
)
from caesura.bus.options import BrokerOptions
from caesura.runtime.settings import Secret

_DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


class Certificates(msgspec.Struct, frozen=True):
    """A certificate authority and what it signed, as PEM files."""

    ca_file: Path
    cert_file: Path
    key_file: Path


def mosquitto_installed() -> bool:
    """Whether tests can have a real Mosquitto."""
    return find_mosquitto() is not None


def mosquitto(
    data_dir: Path,
    *,
    users: Mapping[str, str] | None = None,
    acl: str | None = None,
    tls: Certificates | None = None,
    require_certificate: bool = False,
    unix_path: Path | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    extra: Sequence[str] = (),
) -> LocalBroker:
    """A Mosquitto with this project's settings; enter it with ``async with``.

    Args:
        data_dir: a temporary folder of the test.
        users: name to password; None lets anybody in.
        acl: the text of an access rules file.
        tls: the server's certificates; the port then speaks only TLS.
        require_certificate: clients need a certificate of the same authority.
        memory_limit_bytes: what the broker may have in all.
    """
    port = free_port()
    password_file = None if users is None else _written(data_dir / "passwords", _password_lines(users))
    acl_file = None if acl is None else _written(data_dir / "acl", acl)
    config = mosquitto_config(
        port=port,
        data_dir=data_dir,
        unix_path=unix_path,
        password_file=password_file,
        acl_file=acl_file,
        ca_file=tls.ca_file if tls else None,
        cert_file=tls.cert_file if tls else None,
        key_file=tls.key_file if tls else None,
        require_certificate=require_certificate,
        memory_limit_bytes=memory_limit_bytes,
        extra=extra,
    )
    ready = None
    if tls is not None:
        ready = BrokerOptions(
            url=f"mqtts://localhost:{port}",
            ca_file=str(tls.ca_file),
            cert_file=str(tls.cert_file),
            key_file=str(tls.key_file),
            username="readiness",
            password=Secret(""),
        )
    return LocalBroker(kind="mosquitto", port=port, data_dir=data_dir, config=config, ready=ready)


def shipped_mosquitto(
    name: Literal["broker", "compose"], data_dir: Path, *, users: Mapping[str, str], acl: str
) -> LocalBroker:
    """A Mosquitto with a configuration as it is shipped (``deploy/<name>/mosquitto.conf``); enter it with ``async with``.

    Every line is kept but the paths, the address, and TLS, which changes nothing of what may be sent.

    Args:
        data_dir: a temporary folder of the test.
        users: name to password.
        acl: the text of an access rules file.
    """
    port = free_port()
    password_file = _written(data_dir / "passwords", _password_lines(users))
    acl_file = _written(data_dir / "acl", acl)
    here = {
        "persistence_location": f"persistence_location {data_dir}/",
        "password_file": f"password_file {password_file}",
        "acl_file": f"acl_file {acl_file}",
        "log_dest": "log_dest stderr",
        "listener": f"listener {port} 127.0.0.1",
        "cafile": "",
        "certfile": "",
        "keyfile": "",
    }
    shipped = (_DEPLOY / name / "mosquitto.conf").read_text(encoding="utf-8").splitlines()
    lines = [here.get(line.partition(" ")[0], line) for line in shipped]
    if os.geteuid() == 0:
        lines.insert(0, "user root")  # else it changes to a user who may not read our files
    return LocalBroker(kind="mosquitto", port=port, data_dir=data_dir, config="\n".join([*lines, ""]))


def _password_lines(users: Mapping[str, str]) -> str:
    return "".join(password_line(*each) for each in users.items())


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def make_certificates(folder: Path, *, name: str = "localhost") -> Certificates:
    """A new authority and a certificate for ``name``, good for servers and clients, with openssl."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, ca_file = folder / "ca.key", folder / "ca.crt"
    key_file, request, cert_file = folder / "peer.key", folder / "peer.csr", folder / "peer.crt"
    extensions = folder / "peer.ext"
    extensions.write_text(f"subjectAltName=DNS:{name}\n")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl(
        *(
            "req",
            "-x509",
            *new_key,
            "-keyout",
            ca_key,
            "-out",
            ca_file,
            "-days",
            "2",
            "-subj",
            f"/CN=ca of {name}",
        ),
        *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl("req", *new_key, "-keyout", key_file, "-out", request, "-subj", f"/CN={name}")
    _openssl(
        *("x509", "-req", "-in", request, "-CA", ca_file, "-CAkey", ca_key, "-CAcreateserial"),
        *("-out", cert_file, "-days", "2", "-extfile", extensions),
    )
    return Certificates(ca_file, cert_file, key_file)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stdout.decode(errors='replace')}")
