"""How to reach a broker: its address, our identity there, how long to wait. Checked on construction."""

from __future__ import annotations

import hmac
import ssl
import stat
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from caesura.runtime.errors import ConfigError
from caesura.runtime.settings import Secret, ServiceSettings

_ID_CODE = 16  # hexadecimal digits


class BrokerOptionsError(ConfigError):
    """The broker's address or options are invalid; the text says which and why."""


class TlsFilesUnusable(OSError):
    """The files of a TLS connection must not or cannot be used; ``advice`` says what to do."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


class Address(msgspec.Struct, frozen=True):
    """A broker's address, parsed. ``path`` is set for a unix socket only, ``host`` and ``port`` otherwise."""

    scheme: Literal["mqtt", "mqtts", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class BrokerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a connection needs to know. Names ending in ``_s`` are seconds.

    Raises:
        BrokerOptionsError: when built with values that contradict each other.
    """

    url: str = "mqtt://127.0.0.1:1883"
    """``mqtt://host:port`` (1883), ``mqtts://host:port`` (TLS, 8883) or ``unix:///path``; of a cluster the addresses of several
    nodes, with commas between: ``mqtts://a:8883,b:8883,c:8883``."""
    client_id: str = ""
    """Must be unique at the broker; empty: a random one. A persistent session needs a stable one."""
    client_code: Secret = msgspec.field(default_factory=Secret)
    """Ends the client id at the broker; never shown."""
    username: str = ""
    password: Secret = msgspec.field(default_factory=Secret)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = 60
    """The broker sends our last will after 1.5 times this without a sign of life. Agents inside a VM that
    may be frozen need more than the pause budget, hence 60."""
    clean: bool = True
    """False: a persistent session; the broker keeps QoS 1 messages for us while we are disconnected."""
    session_expiry_s: int = 86_400
    """How long a persistent session outlives its connection (MQTT 5; 3.1.1 leaves it to the broker)."""
    subscribe_qos: Literal[0, 1] = 1
    """0: for a reader that comes and goes, at a cluster: a subscription at QoS 1 takes its nodes some 0.2 s each."""
    max_in_flight: int = 20
    """Publishes that may wait for their acknowledgement at once; more wait for their turn (Mosquitto's default)."""
    backlog_limit: int = 1_000
    """Messages received and not yet handled, of each of QoS 0 and 1, before the slow handler is reported and
    QoS 0 is dropped. QoS 1 is held back at the broker, unless we wait for an answer on the same connection."""
    backlog_bytes: int = 64 * 1024 * 1024
    """The same in bytes, enforced in every case (plus the one message that crosses it)."""
    connect_timeout_s: float = 5.0
    """For each of: reaching the broker (with TLS), its answer to CONNECT, its answer to SUBSCRIBE."""
    reconnect_min_s: float = 0.2
    reconnect_max_s: float = 10.0
    close_timeout_s: float = 5.0
    """How long ``close`` waits for the message that is being handled."""
    ignore_retained: bool = False
    """Whether messages that the broker had retained are dropped: its nodes may have none, or an old one (``caesura.bus.resync``)."""
    silence_s: float = 0.0
    """A broker that has sent nothing for this long gets a ping, and is given up if it does not answer as long; 0: when the keepalive ends.
    For nodes of a cluster: there is another one to go to."""

    def __post_init__(self) -> None:
        address = self.address
        if not self.clean and not self.client_id:
            raise BrokerOptionsError(
                "a persistent session (clean=False) needs a client_id that never changes"
            )
        if bool(self.cert_file) != bool(self.key_file):
            raise BrokerOptionsError("cert_file and key_file are given together or not at all")
        if address.scheme != "mqtts" and (self.ca_file or self.cert_file):
            raise BrokerOptionsError(
                f"TLS files are set but {self.url!r} is not TLS: write mqtts://, or remove the files"
            )
        if self.keepalive_s < 1 or min(self.max_in_flight, self.backlog_limit, self.backlog_bytes) < 1:
            raise BrokerOptionsError(
                "keepalive_s, max_in_flight, backlog_limit and backlog_bytes must be at least 1"
            )
        if not 0 < self.reconnect_min_s <= self.reconnect_max_s or self.connect_timeout_s <= 0:
            raise BrokerOptionsError(
                "0 < reconnect_min_s <= reconnect_max_s and 0 < connect_timeout_s must hold"
            )

    @property
    def identifier(self) -> str:
        """The client id at the broker. Who knows it can disconnect us: logs have ``client_id``."""
        return f"{self.client_id}-{self.client_code.reveal()}" if self.client_code else self.client_id

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The parsed ``url``: each address once, in its order."""
        return parse_addresses(self.url)

    @property
    def address(self) -> Address:
        """The first address of ``url``."""
        return self.addresses[0]

    def at(self, address: Address) -> BrokerOptions:
        """The same for one address."""
        return msgspec.structs.replace(self, url=str(address))

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, or None without TLS. Read from disk each time, so that renewed files are picked up. Blocking.

        Raises:
            TlsFilesUnusable: every user can use the key.
            OSError, ssl.SSLError: a file is missing, unreadable or no certificate.
        """
        if self.address.scheme != "mqtts":
            return None
        if self.key_file and stat.S_IMODE(Path(self.key_file).stat().st_mode) & (stat.S_IROTH | stat.S_IWOTH):
            raise TlsFilesUnusable(
                f"every user of this machine can use the key {self.key_file}", f"chmod 600 {self.key_file}"
            )
        for path in (self.ca_file, self.cert_file, self.key_file):
            if path:
                Path(path).read_bytes()  # ssl's own errors do not name the file
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


def options_from(
    settings: ServiceSettings, *, client_id: str, clean: bool = True, new_id: bool = False
) -> BrokerOptions:
    """The options from a service's settings.

    Args:
        settings: of any service.
        client_id: what logs call it; unique in the fleet.
        clean: nothing is kept for it while it is away. At a cluster its session is kept all the same, unless the id is new.
        new_id: nobody had this id before: it ends at random.

    At a cluster the client id ends in a code that only the owner of the password can compute: clustered brokers do not bind ids to users
    as Mosquitto does (``use_username_as_clientid``), and who knows another's id disconnects it.
    """
    secret = settings.broker_password.reveal()
    code = ""
    cluster = len(parse_addresses(settings.broker_url)) > 1
    if secret and cluster:
        code = hmac.new(secret.encode(), client_id.encode(), "sha256").hexdigest()[:_ID_CODE]
    return BrokerOptions(
        url=settings.broker_url,
        client_id=client_id,
        client_code=Secret(code),
        username=settings.broker_username,
        password=settings.broker_password,
        ca_file=settings.broker_ca_file,
        cert_file=settings.broker_cert_file,
        key_file=settings.broker_key_file,
        protocol=settings.broker_protocol,
        ignore_retained=settings.broker_retained == "ignored",
        # RabbitMQ has the queue of a clean session on one node only: when that dies, its client can connect nowhere until it is back.
        clean=clean and (new_id or not cluster),
    )


def check_broker(settings: ServiceSettings) -> None:
    """Check before anything starts that the settings give valid broker options.

    Raises:
        BrokerOptionsError: they do not; the text says which one and why.
    """
    options_from(settings, client_id="check")


def parse_addresses(url: str) -> tuple[Address, ...]:
    """Parse a broker url with one address, or with those of several nodes of one cluster and commas between.

    A scheme counts for the addresses after it that have none, and is the same for all: a node without TLS would get the password in
    the clear. The path of a unix socket may contain a comma, so there is only one.

    Raises:
        BrokerOptionsError: as ``parse_address``, or for two schemes.
    """
    if url.startswith("unix:"):
        return (parse_address(url),)
    found: dict[Address, None] = {}
    scheme = ""
    for each in url.split(","):
        text = each.strip()
        own, separator, _ = text.partition("://")
        address = parse_address(text if separator or not scheme else f"{scheme}://{text}")
        if scheme and separator and own != scheme:
            raise BrokerOptionsError(
                f"{url!r} mixes {scheme}:// and {own}://: all nodes of a cluster are reached in the same way"
            )
        scheme = address.scheme
        found[address] = None
    return tuple(found)


def parse_address(url: str) -> Address:
    """Parse a broker url with one address.

    Raises:
        BrokerOptionsError: an unknown scheme, no host, or a port that is not a number.
    """
    example = "write mqtt://host:1883, mqtts://host:8883 or unix:///path/to/socket"
    try:
        parts = urlsplit(url)
    except ValueError:  # such as an unclosed bracket
        raise BrokerOptionsError(f"{url!r} is not a broker url: {example}") from None
    if parts.username is not None or parts.password is not None:
        raise BrokerOptionsError(
            "the broker url may not hold a user or password: they have their own settings"
        )
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/"):
            raise BrokerOptionsError(f"{url!r} names no absolute socket path: {example}")
        return Address("unix", path=parts.path)
    if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname:
        raise BrokerOptionsError(f"{url!r} is not a broker url: {example}")
    try:
        port = parts.port
    except ValueError:
        raise BrokerOptionsError(f"{url!r} has no valid port: {example}") from None
    if parts.scheme == "mqtts":
        return Address("mqtts", parts.hostname, port or 8883)
    return Address("mqtt", parts.hostname, port or 1883)
