"""``caesura-pause-guard``, or ``python -m caesura_pause_guard``: the composition root of the guard."""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH100, PTH103

from __future__ import annotations

import sys

try:
    import os
    from collections.abc import Sequence
    from contextlib import suppress
    from typing import get_args

    from caesura_pause_guard.arrival import arrive
    from caesura_pause_guard.output import Output
    from caesura_vmcontrol.intent import Intent, IntentFile, UnreadableIntent
    from caesura_vmcontrol.kernel_change import By
    from caesura_vmcontrol.procfs import boot_id
except KeyboardInterrupt:  # as caesura.runtime.interrupt, which the guard may not import
    sys.exit(130)


_output = Output()
log = _output.log


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, or with ``--arrive`` resume what another boot left. For exit codes see the help."""
    try:
        words = tuple(sys.argv[1:] if argv is None else argv)
        if (known := _arrival_in(words)) is not None:
            return _arrive(*known)
        return _serve(words)
    except KeyboardInterrupt:  # before the server handled the signal
        return 130
    finally:
        _output.flush()


_BY: tuple[By, ...] = tuple(each for each in get_args(By) if each != "guard")


def _arrival_in(words: Sequence[str]) -> tuple[str, By] | None:
    """The state folder, and who runs it, of a command line as our own hook and unit have it; None: argparse shall look at it."""
    values = dict(zip(words[1::2], words[2::2], strict=False))
    if len(words) != 5 or words[0] != "--arrive" or values.keys() != {"--by", "--state-dir"}:
        return None
    by = next((each for each in _BY if each == values["--by"]), None)
    return None if by is None else (os.path.abspath(values["--state-dir"]), by)


def _serve(argv: Sequence[str]) -> int:
    # Guests are paused while an arrival starts, and it needs none of this.
    import argparse  # noqa: PLC0415

    from caesura_pause_guard.earlier_boots import Examination  # noqa: PLC0415
    from caesura_pause_guard.server import AlreadyRunning, GuardServer  # noqa: PLC0415
    from caesura_vmcontrol.marked_pauses import marked_and_paused  # noqa: PLC0415
    from caesura_vmcontrol.notify import Notifier  # noqa: PLC0415
    from caesura_vmcontrol.watchdog import Watchdog  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="caesura-pause-guard",
        description="Resumes paused VMs when the host updater cannot: at the deadline, or when it is gone.",
        epilog="examples:\n  caesura-pause-guard --state-dir /var/lib/caesura/host-updater\n"
        "  caesura-pause-guard --arrive --by unit --state-dir /var/lib/caesura/host-updater\n\n"
        "exit codes: 0 stopped with every VM running, 1 another guard runs, or the folder cannot be used, "
        "130 interrupted before it was up\n"
        "exit codes with --arrive: 0 every VM runs, or there is nothing to do; 1 the folder cannot be used; 3 the guard's intent "
        "cannot be read; 4 a VM is still in its files: the guard tries again; 5 a VM is lost, the log says why",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--state-dir", required=True, help="the host updater's state folder")
    parser.add_argument(
        "--arrive",
        action="store_true",
        help="resume the VMs that another boot of this host left for a change of its kernel, then end; as root, before all services",
    )
    parser.add_argument(
        "--by",
        choices=_BY,
        default="unit",
        help="with --arrive: what runs it, for the report (default: unit)",
    )
    parser.add_argument(
        "--exit-when-alone",
        type=float,
        metavar="SECONDS",
        help="end when no updater was connected and there was no work for this long (default: never)",
    )
    arguments = parser.parse_args(argv)
    folder = os.path.abspath(arguments.state_dir)
    if arguments.arrive:
        return _arrive(folder, arguments.by)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        store = IntentFile(folder)
        examination = Examination(folder, log)
        watch = Watchdog(store, log, release=examination.release)
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
    if found is not None and found.boot_id != boot_id() and found.kernel_change is not None:
        # Its VMs are not gone with that boot: their memory is in the carve-out, their state in files.
        log("guard.intent_of_a_left_kernel", operation=found.operation)
        try:
            examination.begin(found)
            store.store(found)
        except OSError as error:
            log("guard.arrival_not_recorded", why=str(error))
    elif found is not None and found.boot_id != boot_id():
        # None of its processes lives, and their pids may be other processes' by now: a guest that was in a state file must
        # not be loaded into memory that is not its own.
        log("guard.intent_of_another_boot", operation=found.operation)
        with suppress(OSError):
            store.clear()
        found = None
    elif found is not None:
        _disarm_hardware_watchdog(found)
    if found is not None:
        watch.adopt(found)
    elif (paused := marked_and_paused(folder, boot_id(), log)) is not None:
        log("guard.found_paused", vms=[plan.vm for plan in paused.plans], operation=paused.operation)
        watch.adopt(paused, "the guard started and found VMs paused by an operation that it does not hold")
    log("guard.ready", pid=os.getpid(), state=watch.state)
    server.run()
    return 0


def _disarm_hardware_watchdog(intent: Intent) -> None:
    """The guard before this one died, maybe while it was leaving this kernel: the host is not to be reset for that."""
    from caesura_vmcontrol.hardware_watchdog import HardwareWatchdog  # noqa: PLC0415 - as in _serve

    change = intent.kernel_change
    why = HardwareWatchdog().disarm_former() if change is not None and change.watchdog_s else ""
    if why:
        log("guard.hardware_watchdog", why=why)


def _arrive(folder: str, by: By) -> int:
    try:
        return arrive(folder, by, log)
    except OSError as error:
        print(f"caesura-pause-guard: cannot arrive: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1


if __name__ == "__main__":
    sys.exit(main())
