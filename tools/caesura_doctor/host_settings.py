"""The host updater's settings as its unit has them: from the environment, or from the file that systemd reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from caesura.runtime.errors import ConfigError
from caesura.runtime.settings import read_settings
from caesura_host_updater.settings import HostUpdaterSettings

PREFIX = "CAESURA_HOST_UPDATER_"
ENV_FILE = "/etc/caesura/host-updater.env"
_PASSWORD = "/etc/caesura/host-updater.password"  # noqa: S105 - a path; the unit loads it as a credential
_PASSWORD_VARIABLE = f"{PREFIX}BROKER_PASSWORD_FILE"


class EnvFileUnusable(ConfigError):
    """The file with the unit's settings cannot be read."""


def host_settings(env_file: str | None, environ: Mapping[str, str]) -> HostUpdaterSettings:
    """The settings, without the password where only root may read it, as the unit's is: see ``password_error``.

    Args:
        env_file: a file of ``NAME=value`` lines; None: ``ENV_FILE`` where it exists and the environment has no host file.

    Raises:
        EnvFileUnusable: it cannot be read.
        SettingsError: a variable is unknown, missing or wrong.
    """
    known = dict(environ)
    file = _file(env_file, environ)
    if file is not None:
        known.setdefault(f"{PREFIX}GUARD", "external")  # as the unit's, whose file it is
        known |= read_env_file(file)
        if _PASSWORD_VARIABLE not in known and _exists(_PASSWORD) and _may_read(_PASSWORD):
            known[_PASSWORD_VARIABLE] = _PASSWORD
    return read_settings(HostUpdaterSettings, PREFIX, known)


def password_error(settings: HostUpdaterSettings, env_file: str | None, environ: Mapping[str, str]) -> str:
    """Why the broker cannot be asked as the host updater would; empty: it can."""
    if (
        settings.broker_password
        or _file(env_file, environ) is None
        or not _exists(_PASSWORD)
        or _may_read(_PASSWORD)
    ):
        return ""
    return f"{_PASSWORD} is root's, who gives it to the unit: this user may not read it, so the broker is not asked"


def _file(env_file: str | None, environ: Mapping[str, str]) -> str | None:
    """The file that the settings come from, if they do."""
    if env_file is None and f"{PREFIX}HOST_FILE" not in environ and _exists(ENV_FILE):
        return ENV_FILE
    return env_file


def _exists(path: str) -> bool:
    """Also false where its folder may not be entered, for which ``Path.exists`` raises an error."""
    return os.path.exists(path)  # noqa: PTH110 - see above


def _may_read(path: str) -> bool:
    return os.access(path, os.R_OK)


def read_env_file(path: str) -> dict[str, str]:
    """``NAME=value`` lines as systemd reads them: comments, and quotes around a value. Raises EnvFileUnusable."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EnvFileUnusable(f"{path} cannot be read: {error}") from error
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith(("#", ";")):
            continue
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name.strip()] = value
    return found
