"""Why a connection to the broker failed, as a message that says what to do about it. Pure."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping

import msgspec

from caesura.bus.options import Address, BrokerOptions, TlsFilesUnusable
from caesura.bus.port import BusError

UNSUPPORTED_PROTOCOL = 0x84
CLIENT_ID_NOT_VALID = 0x85
BAD_USER_OR_PASSWORD = 0x86
NOT_AUTHORIZED = 0x87
SERVER_UNAVAILABLE = 0x88
SESSION_TAKEN_OVER = 0x8E


class ConnectRefused(BusError):
    """The broker answered CONNECT with a refusal; ``code`` is the MQTT 5 reason code (3.1.1's are mapped to it)."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"the broker refused the connection: {reason}")


class ClosedEarly(BusError):
    """The connection ended before the broker answered CONNECT."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the connection ended before the broker answered ({reason})")


class ConnectTimeout(TimeoutError):
    """The broker was reached, and did not answer CONNECT in time."""

    def __init__(self) -> None:
        super().__init__("the broker did not answer CONNECT in time")


class NoBrokerReached(BusError):
    """None of several brokers can be used; ``failures`` has the reason of each by its address."""

    def __init__(self, failures: Mapping[Address, BusError | OSError]) -> None:
        self.failures = dict(failures)
        super().__init__(f"none of {len(failures)} brokers can be used")


class SubscribeRefused(BusError):
    """The broker refused some of our subscriptions."""

    def __init__(self, filters: list[str]) -> None:
        self.filters = filters
        super().__init__(f"the broker refused to subscribe us to {', '.join(filters)}")


class ConnectionLost(BusError):
    """An established connection ended; ``code`` is the broker's MQTT 5 reason, 0 if it gave none."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"the connection was lost: {reason}")


class ConnectionProblem(msgspec.Struct, frozen=True):
    """What happened, and what the operator can do about it."""

    summary: str
    hint: str


def explain(error: BaseException, options: BrokerOptions) -> ConnectionProblem:
    """Describe the exception of a failed attempt."""
    match error:
        case NoBrokerReached():
            return _none_of(error, options)
        case ConnectRefused() | SubscribeRefused() | ConnectionLost():
            return _refusal(error, options)
        case ClosedEarly():
            return ConnectionProblem(
                str(error),
                "check that the port is the broker's MQTT port, and whether it expects TLS (mqtts://) "
                "or a client certificate",
            )
        case ssl.SSLError():
            return _tls(error)
        case TlsFilesUnusable():
            return ConnectionProblem(str(error), error.advice)
        case FileNotFoundError() | PermissionError():
            return _file(error, options)
        case _:
            return _network(error, options)


def _none_of(error: NoBrokerReached, options: BrokerOptions) -> ConnectionProblem:
    """What happened at each address, and the advice of each, once."""
    problems = {address: explain(failure, options.at(address)) for address, failure in error.failures.items()}
    summaries = [
        each.summary if str(address) in each.summary else f"{address}: {each.summary}"
        for address, each in problems.items()
    ]
    return ConnectionProblem(
        "; ".join(summaries), "; ".join(dict.fromkeys(each.hint for each in problems.values()))
    )


def _tls(error: ssl.SSLError) -> ConnectionProblem:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionProblem(
            f"the broker's certificate was not accepted: {error.verify_message}",
            "set the CA file to the authority that signed it, and use the host name that it is made out to",
        )
    return ConnectionProblem(
        f"TLS failed: {error.reason or error}",
        "check that the port speaks TLS, and that the CA, certificate and key files are PEM files "
        "that belong together",
    )


def _file(error: FileNotFoundError | PermissionError, options: BrokerOptions) -> ConnectionProblem:
    if isinstance(error, PermissionError):
        return ConnectionProblem(
            f"no permission: {error}", "give this user access to the broker's socket or the key file"
        )
    if error.filename:
        return ConnectionProblem(
            f"no such file: {error.filename}", "correct the path of the CA, certificate or key file"
        )
    return ConnectionProblem(
        f"there is no socket at {options.address}", "start the broker, or correct the path"
    )


def _network(error: BaseException, options: BrokerOptions) -> ConnectionProblem:
    address = options.address
    match error:
        case socket.gaierror():
            return ConnectionProblem(
                f"the name {address.host!r} does not resolve: {error.strerror}",
                "check the host in the broker url, and DNS",
            )
        case ConnectTimeout():
            return ConnectionProblem(
                f"{address} accepts connections but does not answer ({options.connect_timeout_s:g} s)",
                "check the broker's load, and that the port is its MQTT port and not one that expects TLS",
            )
        case TimeoutError():
            return ConnectionProblem(
                f"no answer from {address} in time ({options.connect_timeout_s:g} s for each step)",
                "check the network, the firewall and the broker's load",
            )
        case ConnectionResetError() | BrokenPipeError():
            return ConnectionProblem(
                f"{address} closed the connection at once",
                "check that the port is the broker's MQTT port, and whether it speaks TLS (mqtts://) or not",
            )
        case ConnectionRefusedError():
            return ConnectionProblem(
                f"nothing listens at {address}", "start the broker, or correct the port in the broker url"
            )
        case _:
            return ConnectionProblem(
                f"{type(error).__name__}: {error}", "check the network and the broker's log"
            )


def _refusal(
    error: ConnectRefused | SubscribeRefused | ConnectionLost, options: BrokerOptions
) -> ConnectionProblem:
    if isinstance(error, SubscribeRefused):
        return ConnectionProblem(
            str(error),
            f"give user {options.username!r} read access to these topics in the broker's access rules",
        )
    match error.code:
        case _ if error.code == SESSION_TAKEN_OVER:
            advice = (
                f"another client connected with the id {options.client_id!r}: give every service its own, "
                "and stop a second instance of this one"
            )
        case _ if error.code in {BAD_USER_OR_PASSWORD, NOT_AUTHORIZED}:
            advice = (
                f"check the password of user {options.username!r}, and whether the broker knows this user"
            )
        case _ if error.code == UNSUPPORTED_PROTOCOL:
            advice = f"set the protocol to 'auto' (now {options.protocol!r})"
        case _ if error.code == CLIENT_ID_NOT_VALID:
            advice = f"the broker does not accept the client id {options.client_id!r}: shorten or change it"
        case _ if error.code == SERVER_UNAVAILABLE:
            advice = "the broker is up but not serving: see its log"
        case _:
            advice = "see the broker's log"
    return ConnectionProblem(str(error), advice)
