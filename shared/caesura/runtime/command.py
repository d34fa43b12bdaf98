"""The command line of all services: help that lists the settings, configuration checks, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.interrupt import EXIT_INTERRUPTED
from caesura.runtime.logs import configure_logging, get_logger
from caesura.runtime.settings import (
    ServiceSettings,
    describe_settings,
    read_settings,
    show_settings,
)

EXIT_CONFIG = ConfigError.exit_code

S = TypeVar("S", bound=ServiceSettings)


def run_service(
    name: str,
    summary: str,
    settings_type: type[S],
    main: Callable[[S], Coroutine[Any, Any, None]],
    *,
    checks: Sequence[Callable[[S], object]] = (),
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Parse the command line, read the settings, run ``main`` until it ends. The exit code is returned:

    0 stopped by a signal and drained, 1 failed (the log says why), 2 bad configuration, 130 interrupted early.

    ``checks`` validate what the type of a setting cannot (an address, a file that it names): each raises
    ConfigError, all are run, before ``main`` and by ``--check-config``, and their findings are reported together.
    """
    try:
        return _run(name, summary, settings_type, main, checks, argv, environ)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(
    name: str,
    summary: str,
    settings_type: type[S],
    main: Callable[[S], Coroutine[Any, Any, None]],
    checks: Sequence[Callable[[S], object]],
    argv: Sequence[str] | None,
    environ: Mapping[str, str] | None,
) -> int:
    environ = os.environ if environ is None else environ
    prefix = f"CAESURA_{name.upper().replace('-', '_')}_"
    arguments = _parser(name, summary, settings_type, prefix).parse_args(argv)
    try:
        settings = read_settings(settings_type, prefix, environ)
    except ConfigError as error:
        return _refuse(name, [error])
    if arguments.print_config:
        print(show_settings(settings, prefix))  # noqa: T201 - the command's answer
        return 0
    if wrong := list(_found(checks, settings)):
        return _refuse(name, wrong)
    if arguments.check_config:
        print("configuration is valid")  # noqa: T201 - the command's answer
        return 0
    configure_logging(name, style=settings.log_format, level=settings.log_level)
    log = get_logger("caesura.command")
    try:
        asyncio.run(main(settings))
    except CaesuraError as error:
        log.error("service.failed", error=type(error).__name__, why=str(error))
        return error.exit_code
    except BaseExceptionGroup as group:
        found = list(
            dict.fromkeys(leaves(group))
        )  # one failure may be raised by several tasks that wait for it
        known = [each for each in found if isinstance(each, CaesuraError)]
        for each in known:
            log.error("service.failed", error=type(each).__name__, why=str(each))
        if len(known) < len(found):
            raise
        return max(each.exit_code for each in known)
    return 0


def _found(checks: Sequence[Callable[[S], object]], settings: S) -> Iterator[ConfigError]:
    for check in checks:
        try:
            check(settings)
        except ConfigError as error:
            yield error


def _refuse(name: str, wrong: Sequence[ConfigError]) -> int:
    for each in wrong:
        print(f"caesura-{name}: {each}", file=sys.stderr)  # noqa: T201 - before logging is set up
    return EXIT_CONFIG


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The plain exceptions inside nested exception groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def _parser(
    name: str, summary: str, settings_type: type[ServiceSettings], prefix: str
) -> argparse.ArgumentParser:
    lines = [
        f"  {variable}" + (f" (default {default})" if default else "") + f"\n      {description}"
        for variable, default, description in describe_settings(settings_type, prefix)
    ]
    parser = argparse.ArgumentParser(
        prog=f"caesura-{name}",
        description=summary,
        epilog="settings, read from the environment:\n"
        + "\n".join(lines)
        + f"\n\nexample:\n  {prefix}BROKER_URL=mqtt://broker:1883 caesura-{name}\n\nexit codes: 0 drained after a signal, 1 failed, 2 bad configuration, 3 superseded (coordinator), "
        "130 interrupted before it was up",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="read and check the settings and the files that they name, then exit",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings without secrets, then exit"
    )
    parser.add_argument("--version", action="version", version=f"caesura {version('caesura')}")
    return parser
