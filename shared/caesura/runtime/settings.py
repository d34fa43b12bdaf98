"""Settings from the environment: read once, checked completely, printed without secrets.

Each service has one frozen struct and one prefix, ``CAESURA_<SERVICE>_``. A variable with that prefix that
names no setting is an error (a misspelt variable must not be a silent default), and so is one that starts with
``CAESURA_`` and belongs to no service. A secret is given as a file, ``..._FILE``, and never printed.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from caesura.runtime.env import PREFIX, RESERVED, unknown_variables
from caesura.runtime.errors import ConfigError
from caesura.runtime.validation_errors import describe_error

_SECRET_BYTES = 4096  # a secret is one line; this bounds the read of a device or a huge file


_USER_INFO = re.compile(r"://([^:@\s]*):\S*@")
"""Up to the last @: an unescaped password may have any character, slashes too."""
_PARAMETER = re.compile(r"([?&])([^=&\s]+)=([^&\s]*)")


def redacted(text: str) -> str:
    """A setting as it may be shown: if it is a URL, without a password that should not be in it."""
    if "://" not in text:
        return text
    text = _USER_INFO.sub(r"://\1:***@", text)
    return _PARAMETER.sub(
        lambda found: f"{found[1]}{found[2]}=***" if "pass" in unquote(found[2]).lower() else found[0], text
    )


class SettingsError(ConfigError):
    """The environment is not a valid configuration; the text names the variables."""


class Secret:
    """A value that is never shown: not in logs, not in ``--print-config``, not in a traceback."""

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself; call this only at the point of use."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret('***')" if self._value else "Secret('')"


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that every service on the bus has."""

    fleet: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]{1,63}\Z",
            description="Name of the fleet, in the CloudEvents `source` of its messages and in metrics. Each fleet has a broker of its own.",
        ),
    ] = "default"
    broker_url: Annotated[
        str,
        Meta(
            description="`mqtt://host:port`, `mqtts://host:port` (TLS) or `unix:///path/to/socket`; of a cluster the addresses of its nodes: `mqtts://a:8883,b:8883,c:8883`."
        ),
    ] = "mqtt://127.0.0.1:1883"
    broker_protocol: Annotated[
        Literal["auto", "5", "3.1.1"],
        Meta(description="MQTT version; `auto` tries 5 and falls back to 3.1.1."),
    ] = "auto"
    broker_retained: Annotated[
        Literal["trusted", "ignored"],
        Meta(
            description="`ignored`: for a broker whose nodes keep retained messages each for itself (RabbitMQ). What it retained is not read; it is asked for on the bus. The same for all services of a fleet."
        ),
    ] = "trusted"
    broker_username: Annotated[str, Meta(description="User name at the broker; empty for none.")] = ""
    broker_password: Annotated[
        Secret, Meta(description="Password at the broker, read from the file named here.")
    ] = msgspec.field(default_factory=Secret)
    broker_ca_file: Annotated[str, Meta(description="CA certificates (PEM) to check the broker against.")] = (
        ""
    )
    broker_cert_file: Annotated[str, Meta(description="Client certificate (PEM) for mutual TLS.")] = ""
    broker_key_file: Annotated[str, Meta(description="Key (PEM) of the client certificate.")] = ""
    log_format: Annotated[
        Literal["auto", "console", "json"], Meta(description="`auto`: console on a terminal, JSON otherwise.")
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level to log.")
    ] = "info"
    health_listen: Annotated[
        str,
        Meta(
            description="`host:port` or `unix:/path` for /live, /ready and /metrics; empty for no listener."
        ),
    ] = ""


S = TypeVar("S", bound=msgspec.Struct)


def is_secret(field: msgspec.structs.FieldInfo) -> bool:
    """Whether a setting's value comes from a file and is never printed."""
    return Secret in (field.type, *typing.get_args(field.type))


def variable_name(prefix: str, field: msgspec.structs.FieldInfo) -> str:
    """The environment variable of a field; a secret's ends in ``_FILE``."""
    return f"{prefix}{field.name.upper()}{'_FILE' if is_secret(field) else ''}"


def read_settings(settings: type[S], prefix: str, environ: Mapping[str, str]) -> S:
    """Build ``settings`` from the variables that start with ``prefix``.

    Raises:
        SettingsError: naming every unknown variable (also one that belongs to no service, with the nearest known one), every missing one, and
            the value that does not fit.
    """
    fields = {variable_name(prefix, field): field for field in msgspec.structs.fields(settings)}
    given = {name: value for name, value in environ.items() if name.startswith(prefix)}
    unknown = sorted(set(given) - set(fields))
    wrong = [_unknown(name, list(fields)) for name in unknown]
    wrong += [_stranger(name, prefix, list(fields)) for name in unknown_variables(environ)]
    if wrong:
        raise SettingsError("; ".join(wrong))
    missing = sorted(name for name, field in fields.items() if field.required and name not in given)
    if missing:
        raise SettingsError(
            f"missing setting {', '.join(missing)}; run with --help to see what each one is for"
        )
    raw: dict[str, Any] = {}
    for name, text in given.items():
        field = fields[name]
        raw[field.name] = _read_secret(name, text) if is_secret(field) else _plain(text, field.type)
    for name, field in fields.items():
        if field.name not in raw:
            continue
        single = _single(field)
        try:
            msgspec.convert({field.name: raw[field.name]}, single, strict=False, dec_hook=_decode_custom)
        except msgspec.ValidationError as error:
            shown = "the file's content" if is_secret(field) else repr(redacted(given[name]))
            why = describe_error(error, single).split(" - at ")[0]
            if why.startswith("Expected `array`"):
                why += '; give JSON, such as ["one", "two"]'
            raise SettingsError(f"{name}={shown}: {why}") from error
    try:
        return msgspec.convert(raw, settings, strict=False, dec_hook=_decode_custom)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{prefix}*: {error}") from error


def show_settings(settings: msgspec.Struct, prefix: str) -> str:
    """The effective configuration as ``NAME=value`` lines; secrets show only whether they are set."""
    lines = []
    for field in msgspec.structs.fields(type(settings)):
        value = getattr(settings, field.name)
        if isinstance(value, Secret):
            text = "(set, not shown)" if value else ""
        elif isinstance(value, list | tuple | dict):
            text = msgspec.json.encode(value).decode()
        else:
            text = "" if value is None else redacted(str(value))
        lines.append(f"{variable_name(prefix, field)}={text}")
    return "\n".join(lines)


def describe_settings(settings: type[msgspec.Struct], prefix: str) -> list[tuple[str, str, str]]:
    """(variable, default, description) of every setting, for ``--help`` and the generated reference."""
    rows = []
    for field in msgspec.structs.fields(settings):
        # The last one: a setting's own description comes after that of its type.
        said = [
            each.description
            for each in typing.get_args(field.type)
            if isinstance(each, Meta) and each.description
        ]
        description = said[-1] if said else ""
        if field.required:
            default = "required"
        elif is_secret(field):
            default = ""
        else:
            value = field.default if field.default is not msgspec.NODEFAULT else _from_factory(field)
            default = "" if value in ("", None) else _shown(value)
        rows.append((variable_name(prefix, field), default, description))
    return rows


def _from_factory(field: msgspec.structs.FieldInfo) -> object:
    factory = field.default_factory
    return factory() if callable(factory) else ""


def _shown(value: object) -> str:
    return (
        msgspec.json.encode(value).decode() if isinstance(value, list | tuple | dict | bool) else str(value)
    )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]}?" if near else "; run with --help for the list"
    return f"unknown setting {name}{hint}"


def _stranger(name: str, prefix: str, known: list[str]) -> str:
    """As ``_unknown``, for a variable that belongs to no service: most likely the prefix is wrong."""
    whole = prefix + name.removeprefix(PREFIX)
    if whole in known:
        return f"unknown setting {name}, did you mean {whole}?"
    rests = {
        each.removeprefix(PREFIX): each for each in (*known, *RESERVED)
    }  # their common part would make all look alike
    near = difflib.get_close_matches(name.removeprefix(PREFIX), rests, n=1, cutoff=0.8)
    hint = f"did you mean {rests[near[0]]}?" if near else f"no service has it; {PREFIX}* is for Caesura's own"
    return f"unknown setting {name}, {hint}"


def _read_secret(name: str, path: str) -> Secret:
    """The content of a secret's file: one line, in a file that only its owner (and perhaps a group) can read.

    No error contains the content or, where that may be the secret itself, the name.
    """
    shown = f" {path!r}" if _is_path(path) else " that it names"
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a valid file name"
        raise SettingsError(
            f"{name}: cannot read the file{shown}: {why} (it is the name of a file with the secret, not the secret)"
        ) from None
    if stat.S_ISREG(mode) and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SettingsError(f"{name}: every user of this machine can use the file{shown}: chmod 600 it")
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: the file{shown} is not UTF-8") from None
    if not text:
        raise SettingsError(f"{name}: the file{shown} is empty; unset the variable if there is no secret")
    if len(text.splitlines()) > 1:
        raise SettingsError(
            f"{name}: the file{shown} has more than one line: it holds the secret and nothing else"
        )
    if len(content) > _SECRET_BYTES:
        raise SettingsError(f"{name}: the file{shown} has more than {_SECRET_BYTES} bytes")
    return Secret(text)


def _is_path(text: str) -> bool:
    """Whether this can be shown: the name of something in an existing folder, so hardly a password."""
    path = Path(text)
    try:
        return path.is_absolute() and path.parent != Path("/") and path.parent.is_dir()
    except (OSError, ValueError):
        return False


def _plain(text: str, wanted: Any) -> Any:
    # Lists and tables are given as JSON; everything else is text that msgspec converts (strict=False).
    base = typing.get_args(wanted)[0] if typing.get_origin(wanted) is Annotated else wanted
    if typing.get_origin(base) in {list, tuple, dict}:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError:
            return text
    return text


def _single(field: msgspec.structs.FieldInfo) -> type[msgspec.Struct]:
    # One-field struct: converting field by field lets the error name the faulty variable.
    return msgspec.defstruct("Setting", [(field.name, field.type)])


def _decode_custom(wanted: type, value: Any) -> Any:
    if wanted is Secret and isinstance(value, Secret):
        return value
    raise NotImplementedError(f"settings of type {wanted} cannot be read from the environment")
