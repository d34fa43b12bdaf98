"""``python -m caesura_demo.setup FOLDER``: secrets and configuration of the compose project, made on every start.

Files that are neither secret nor generated, but written by hand for the broker, Prometheus and Grafana, are copied from the image.

An existing secret is kept, a missing one is created, and a broken one is reported and nothing is started.
Run it as root with CAP_CHOWN: a secret belongs to root and to the group of the one container that reads it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from caesura.bus.local_broker import password_line
from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import configure_logging, get_logger
from caesura_demo.compose_fleet import (
    BROKER_UID,
    GRAFANA_SECRET,
    HEALTH_USER,
    STORE_SECRET,
    compose_layout,
    config_files,
    secret_readers,
)
from caesura_demo.rollout_loop import settings_from

VARIABLES = (
    "CAESURA_IMAGE",
    "CAESURA_PORT_BROKER",
    "CAESURA_PORT_EXPORTER",
    "CAESURA_PORT_GRAFANA",
    "CAESURA_PORT_PROMETHEUS",
    "CAESURA_ROLLOUTS",
    "CAESURA_ROLLOUT_PAUSE",
)
"""Every variable that ``docker-compose.yml`` reads."""

_SHORTEST = 16
"""Characters: a shorter text is not one of our passwords, but the rest of an interrupted write."""

_SHARED = "broker"
"""The folder that contains generated files in addition to the copied ones."""

_log = get_logger("caesura.setup")


class SetupError(CaesuraError):
    """The suite cannot be started like this; the text says what to do."""

    exit_code = 2


def main(argv: Sequence[str] | None = None) -> int:
    """0: everything is in place; 2: something has to be corrected first."""
    parser = argparse.ArgumentParser(prog="python -m caesura_demo.setup", description=__doc__)
    parser.add_argument("folder", type=Path, help="path in the containers: /etc/caesura")
    parser.add_argument("--state", default="/var/lib/caesura", help="where a host keeps its state")
    parser.add_argument(
        "--renew", action="append", default=[], metavar="SECRET", help="create this secret again"
    )
    parser.add_argument(
        "--files", type=Path, default=Path("/usr/local/share/caesura"), help="files to copy unchanged"
    )
    arguments = parser.parse_args(argv)
    configure_logging("setup")
    try:
        check_variables(os.environ)
        prepare(arguments.folder, state=arguments.state, renew=arguments.renew)
        copy_files(arguments.files, arguments.folder)
    except (CaesuraError, OSError) as error:
        _log.error("setup.failed", why=str(error))
        return SetupError.exit_code
    return 0


def check_variables(environ: Mapping[str, str]) -> None:
    """A misspelt variable must not be a silent default, nor a wrong value a service that keeps restarting.

    Raises:
        SetupError: naming each unknown one and the nearest known one, or the value and the allowed ones.
    """
    unknown = [name for name in sorted(environ) if name.startswith("CAESURA_") and name not in VARIABLES]
    if unknown:
        said = []
        for name in unknown:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            said.append(f"unknown variable {name}" + (f", did you mean {near[0]}?" if near else ""))
        raise SetupError(f"{'; '.join(said)} (known: {', '.join(VARIABLES)}). Correct it in .env")
    try:
        settings_from(environ)
    except CaesuraError as error:
        raise SetupError(f"{error}. Correct it in .env, or in your shell") from error


def prepare(folder: Path, *, state: str, renew: Sequence[str] = ()) -> None:
    """Write everything below ``folder``.

    Raises:
        SetupError: a secret is broken, or ``renew`` names an unknown one.
        OSError: the folder cannot be written, or the owner of files cannot be changed.
    """
    layout = compose_layout()
    readers = secret_readers(layout)
    unknown = [name for name in renew if name not in readers]
    if unknown:
        raise SetupError(f"no secret is named {', '.join(unknown)}; there are {', '.join(readers)}")
    place = folder / "secrets"
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    made = [name for name in readers if name in renew or not (place / name).exists()]
    broken = {name: why for name in readers if name not in made and (why := _broken(place / name))}
    if broken:
        faults = "; ".join(f"{place / name} {why}" for name, why in broken.items())
        again = " ".join(f"--renew {name}" for name in broken)
        raise SetupError(
            f"{faults}. Create it again: docker compose run --rm setup {folder} {again}, then "
            "docker compose up --force-recreate"
        )
    for name in made:
        write(place / name, secrets.token_urlsafe(24) + "\n", group=readers[name], mode=0o440)
    passwords = {name: (place / name).read_text(encoding="utf-8").strip() for name in readers}
    for path, text in config_files(layout, secrets=str(place), state=state).items():
        # Mosquitto requires to own its files, unreadable for others.
        mine = {"owner": BROKER_UID, "group": BROKER_UID, "mode": 0o400} if path.startswith("broker/") else {}
        write(folder / path, text, **{"mode": 0o444, **mine})
    elsewhere = {GRAFANA_SECRET, STORE_SECRET}
    known = "".join(password_line(name, each) for name, each in passwords.items() if name not in elsewhere)
    write(folder / "broker" / "passwords", known, owner=BROKER_UID, group=BROKER_UID, mode=0o400)
    # Options of the broker's health check: on a command line every user could read the password.
    options = f"-u {HEALTH_USER}\n-P {passwords[HEALTH_USER]}\n"
    write(folder / "broker" / "mosquitto_sub", options, owner=BROKER_UID, group=BROKER_UID, mode=0o400)
    _log.info("setup.done", secrets=len(readers), made=sorted(made), folder=str(folder))
    if made and len(made) < len(readers):
        _log.warning(
            "setup.secrets_changed",
            made=sorted(made),
            advice="running containers still have the old ones: docker compose up --force-recreate",
        )


def copy_files(source: Path, folder: Path) -> None:
    """Copy every folder of ``source`` into ``folder``, readable for everybody; files that it no longer has are removed.

    Raises:
        OSError: something cannot be read or written.
    """
    for place in sorted(source.iterdir()):
        files = {path.relative_to(source): path for path in place.rglob("*") if path.is_file()}
        for name, path in files.items():
            write(folder / name, path.read_text(encoding="utf-8"), mode=0o444)
        if place.name == _SHARED:
            continue
        for path in (folder / place.name).rglob("*"):
            if path.is_file() and path.relative_to(folder) not in files:
                path.unlink()


def _broken(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    if len(text) < _SHORTEST:
        return f"is broken: {len(text)} characters, {_SHORTEST} or more are needed"
    return (
        ""
        if text.isprintable() and text.isascii()
        else "is broken: it contains characters that our passwords do not have"
    )


def write(path: Path, text: str, *, owner: int = 0, group: int = 0, mode: int) -> None:
    """Replace a file in one step, never readable by others than intended. As root, its owner is changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        # The mode first: after the change of owner we may not change it.
        os.fchmod(handle, mode)
        if os.geteuid() == 0:
            os.fchown(handle, owner, group)
        file.flush()
        os.fsync(handle)
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
