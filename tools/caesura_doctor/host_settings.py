"""The host updater's settings as its unit has them: from the environment, or from the file that systemd reads."""

from __future__ import annotations

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
    """The settings.

    Args:
        env_file: a file of ``NAME=value`` lines; None: ``ENV_FILE`` where it exists and the environment has no host file.

    Raises:
        EnvFileUnusable: it cannot be read.
        SettingsError: a variable is unknown, missing or wrong.
    """
    known = dict(environ)
    if env_file is None and f"{PREFIX}HOST_FILE" not in environ and Path(ENV_FILE).exists():
        env_file = ENV_FILE
    if env_file is not None:
        known |= read_env_file(env_file)
        if _PASSWORD_VARIABLE not in known and Path(_PASSWORD).exists():
            known[_PASSWORD_VARIABLE] = _PASSWORD
    return read_settings(HostUpdaterSettings, PREFIX, known)


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
