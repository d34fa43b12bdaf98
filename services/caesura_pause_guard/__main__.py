"""``caesura-pause-guard``, or ``python -m caesura_pause_guard``: the composition root of the guard."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH100, PTH103

from __future__ import annotations

import sys

try:
    import argparse
    import os
    from collections.abc import Sequence
    from contextlib import suppress

    from caesura_pause_guard.output import Output
    from caesura_pause_guard.server import AlreadyRunning, GuardServer
    from caesura_vmcontrol.intent import IntentFile, UnreadableIntent
    from caesura_vmcontrol.notify import Notifier
    from caesura_vmcontrol.procfs import boot_id
    from caesura_vmcontrol.rescue import marked_and_paused
    from caesura_vmcontrol.watchdog import Watchdog
except KeyboardInterrupt:  # as caesura.runtime.interrupt, which the guard may not import
    sys.exit(130)


_output = Output()
log = _output.log


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM. Exit code: 0 stopped, 1 another guard runs or the state folder is unusable, 130 interrupted."""
    try:
        return _serve(argv)
    except KeyboardInterrupt:  # before the server handled the signal
        return 130
    finally:
        _output.flush()


def _serve(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="caesura-pause-guard",
        description="Resumes paused VMs when the host updater cannot: at the deadline, or when it is gone.",
        epilog="example:\n  caesura-pause-guard --state-dir /var/lib/caesura/host-updater\n\n"
        "exit codes: 0 stopped with every VM running, 1 another guard runs, or the folder cannot be used, "
        "130 interrupted before it was up",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--state-dir", required=True, help="the host updater's state folder")
    parser.add_argument(
        "--exit-when-alone",
        type=float,
        metavar="SECONDS",
        help="end when no updater was connected and there was no work for this long (default: never)",
    )
    arguments = parser.parse_args(argv)
    folder = os.path.abspath(arguments.state_dir)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        store = IntentFile(folder)
        watch = Watchdog(store, log)
        notifier = Notifier.taken_from(os.environ)
        server = GuardServer(
            folder, watch, log, exit_when_alone_s=arguments.exit_when_alone, notifier=notifier
        )
        try:
            found = store.load()
        except UnreadableIntent as error:
            found = None
            log("guard.intent_unreadable", why=str(error))
    except (AlreadyRunning, OSError) as error:
        print(f"caesura-pause-guard: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1
    if found is not None and found.boot_id != boot_id():
        # None of its processes lives, and their pids may be other processes' by now: a guest that was in a state file must
        # not be loaded into memory that is not its own.
        log("guard.intent_of_another_boot", operation=found.operation)
        with suppress(OSError):
            store.clear()
        found = None
    if found is not None:
        watch.adopt(found)
    elif (paused := marked_and_paused(folder, boot_id(), log)) is not None:
        log("guard.found_paused", vms=[plan.vm for plan in paused.plans], operation=paused.operation)
        watch.adopt(paused, "the guard started and found VMs paused by an operation that it does not hold")
    log("guard.ready", pid=os.getpid(), state=watch.state)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
