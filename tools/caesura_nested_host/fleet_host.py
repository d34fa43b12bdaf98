"""A host in emulation that belongs to a fleet: the installed host updater and pause guard, and guests in the carve-out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import tomli_w

from caesura.contract.messages import KernelFigure
from caesura_ctl.fleet_view import FleetView
from caesura_nested_host.guests import MEMORY, GuestPause, guest_pause
from caesura_nested_host.image import CARVE_OUT, Image
from caesura_nested_host.machine import FIRST, SECOND, CommandFailed, HostEnded, NestedHost

SLOW = frozenset(("kernel_not_ready", "method_unavailable", "prepare_failed", "freeze_failed"))
"""Codes of a host whose guests stayed in the old kernel since QEMU or the host was too slow: nothing is quick in the emulation of a busy machine."""
_FIGURES = "/var/lib/caesura/host-updater/kexec-figures.json"
_GUESTS = {"a": FIRST, "b": SECOND}
_ACCOUNT_S = 60.0  # s: for the shell of a host that may hang
_LINES = {FIRST: "/dev/ttyS2", SECOND: "/dev/ttyS3"}


class FleetHost:
    """One host with two guests of one set and domain.

    Args:
        name: of the host; its guests are ``NAME-a`` and ``NAME-b``.
        folder: for the emulator's files.
        domain: of its guests.
        early: whether the host is prepared for an arrival in the initramfs, or by the unit.
        watchdog_s: after which its hardware watchdog resets it in a change of its kernel, in seconds; 0: it has none.
        environ: as ``NestedHost`` has it.
    """

    def __init__(
        self,
        name: str,
        image: Image,
        folder: Path,
        *,
        domain: int,
        early: bool = True,
        watchdog_s: int = 0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.image = image
        self.machine = NestedHost(
            name, image, folder, environ=environ, devices=("i6300esb",) if watchdog_s else ()
        )
        self.guests = {f"{name}-{letter}": line for letter, line in _GUESTS.items()}
        self._domain = domain
        self._early = early
        self._watchdog_s = watchdog_s

    def _host_file(self) -> str:
        vms = [
            {
                "name": vm,
                "set": "web",
                "update_domain": self._domain,
                "agent": False,
                "qemu": {
                    "memory_mib": 32,
                    "machine": "pc-q35-7.2",
                    "kernel": "/opt/rig/guest.elf",
                    "extra": [
                        *("-chardev", f"file,id=beat,path={_LINES[line]},append=on"),
                        *("-serial", "chardev:beat"),
                    ],
                },
            }
            for vm, line in self.guests.items()
        ]
        return tomli_w.dumps(
            {
                "host": self.name,
                "driver": "qemu",
                "kernel": {"kexec": True, "early": self._early, "watchdog_s": self._watchdog_s},
                "qemu": {"accel": "tcg", "run_dir": "/run/caesura", "start_timeout_s": 300.0},
                "vm": vms,
            }
        )

    def updates(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Name to the kernel, and to what its command line has beside the usual."""
        size, _, start = CARVE_OUT.partition("!")
        return {
            "kernel-new": (self.image.new, ()),
            "kernel-old": (self.image.old, ()),
            # Neither an init in its initramfs nor a root file system: it panics before the hook runs.
            "kernel-panic": (self.image.new, ("rdinit=/none", "root=/dev/none", "init=/none")),
            # A shell that waits for somebody at the console, instead of the initramfs: it hangs before the hook runs.
            "kernel-hang": (self.image.new, ("rdinit=/bin/sh",)),
            "kernel-stuck": (self.image.new, ("init=/opt/rig/stuck-init",)),
            "kernel-crash": (self.image.new, ("crashkernel=384M", "init=/opt/rig/crash-init")),
            # The carve-out's memory becomes ordinary memory (kernel-parameters.txt: memmap=nn%ss-oldtype+newtype).
            "kernel-without": (self.image.new, (f"memmap={size}%{start}-12+1",)),
        }

    def _figures(self, seconds: float) -> str:
        pairs = ((self.image.old, self.image.new), (self.image.new, self.image.old))
        figures = [
            KernelFigure(
                to=second,
                former=first,
                seconds=seconds,
                at=datetime.now(UTC),
                rehearsal=True,
                early=self._early,
            )
            for first, second in pairs
        ]
        return msgspec.json.encode(figures).decode()

    def prepare(self, broker_port: int) -> None:
        """As an operator does: prepare-kexec, the files in /etc/caesura, an update for each kernel. No guest runs yet. Blocking."""
        machine = self.machine
        machine.wait_shell()
        settings = {
            "BROKER_URL": f"mqtt://10.0.2.2:{broker_port}",
            "BROKER_USERNAME": f"host_{self.name}",
            "HOST_FILE": "/etc/caesura/host.toml",
            "CLOCK_TIMEOUT_S": "1",
            "LOG_FORMAT": "json",
        }
        files = {
            "/etc/caesura/host.toml": self._host_file(),
            "/etc/caesura/host-updater.env": "\n".join(
                f"CAESURA_HOST_UPDATER_{key}={value}" for key, value in settings.items()
            ),
            "/etc/caesura/host-updater.password": "x",
            **{
                f"/etc/caesura/updates.d/{name}.toml": tomli_w.dumps(
                    {
                        "name": name,
                        "version": name,
                        "impact": "pause",
                        "scope": "host",
                        "kernel": "kexec",
                        "kernel_release": release,
                        "expected_s": 10.0,
                        "timeout_s": 600.0,
                        "argv": [
                            *("sudo", "/opt/caesura/bin/caesura", "host", "load-kernel", release),
                            *(() if self._early else ("--late",)),
                            *(f"--append={word}" for word in words),
                        ],
                    }
                )
                for name, (release, words) in self.updates().items()
            },
        }
        script = ["set -e", f"caesura host prepare-kexec {'' if self._early else '--late '}--apply"]
        for path, text in files.items():
            script.append(f"mkdir -p $(dirname {path}); cat >{path} <<'END-OF-FILE'\n{text}\nEND-OF-FILE")
        machine.run("\n".join(script))

    def start_updater(self, *, figure_s: float | None = 5.0) -> None:
        """Start the host updater, now and at each boot, and with it the guests. Blocking.

        Args:
            figure_s: how long changes of the kernel are said to take, in seconds, since nothing that is emulated fits a budget surely;
                None: what was measured.
        """
        script = ["set -e"]
        if figure_s is not None:
            script.append(f"cat >{_FIGURES} <<'END-OF-FILE'\n{self._figures(figure_s)}\nEND-OF-FILE")
            script.append(f"chown caesura-host: {_FIGURES}")
        script.append("systemctl enable --quiet caesura-host-updater")
        script.append("systemctl restart --no-block caesura-host-updater")
        self.machine.run("\n".join(script))

    def rehearse(self) -> KernelFigure:
        """Measure the change to the new kernel by ``caesura host rehearse-kexec``; the host runs that kernel then. Blocking.

        Raises:
            CommandFailed, HostEnded, TimeoutError: it did not come back with a figure.
        """
        self.machine.run("systemctl stop caesura-host-updater; ! pgrep qemu-system")
        since = self.machine.begin(f"caesura host rehearse-kexec {self.image.new} --yes --watchdog 0")
        self.machine.wait_shell(since=since)
        self.start_updater(figure_s=None)
        # Each start of a Python there takes seconds from what is waited for, so only one is.
        figures = f"until [ -s {_FIGURES} ]; do sleep 1; done; caesura host kernel-figures --json"
        return msgspec.convert(self.machine.json(figures), list[KernelFigure])[0]

    def ready(self, fleet_view: FleetView) -> bool:
        """Whether another kernel can be started under its guests, as far as the fleet sees."""
        found = fleet_view.hosts.get(self.name)
        if (
            found is None
            or not fleet_view.is_online(self.name)
            or found.guard != "ready"
            or found.kernel is None
        ):
            return False
        well = not found.kernel.problems and len(found.kernel.figures) > 0
        return well and all(vm.state == "running" and "kexec" in vm.methods for vm in found.vms)

    def until_connected(self) -> None:
        """Wait until the present host updater is at the broker: what the fleet sees may be the one before. Blocking.

        Raises:
            CommandFailed, HostEnded, TimeoutError: it is not.
        """
        unit = "caesura-host-updater"
        script = (
            f"while systemctl list-jobs --no-legend | grep -q {unit}; do sleep 1; done",
            f"id=$(systemctl show --property InvocationID --value {unit})",
            "until journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID=$id | grep -q bus.connected; do sleep 1; done",
        )
        self.machine.run("\n".join(script))

    def clock_offset_s(self) -> tuple[float, float]:
        """Its CLOCK_REALTIME minus this machine's, seconds: at least, and at most. Blocking.

        Raises:
            CommandFailed, HostEnded, TimeoutError: it does not say.
        """
        before = time.time()
        there = float(self.machine.run("date +%s.%N").split()[-1])
        return there - time.time(), there - before

    def account(self) -> str:
        """What was last seen of the host, and what its services said, for failure reports. Blocking."""
        wanted = "journalctl --no-pager -o short-monotonic -u caesura-host-updater -u caesura-pause-guard -u caesura-arrive"
        try:
            said = self.machine.run(f"{wanted} | tail -60 | cut -c1-800", patience_s=_ACCOUNT_S, check=False)
        except (CommandFailed, HostEnded, TimeoutError) as error:
            said = f"its shell does not answer: {str(error).splitlines()[0]}"
        return f"\n== {self.name}: its serial lines\n{self.machine.last_lines()}\n== {self.name}: its services\n{said}"

    def until_guests_beat(self, since: float = 0.0) -> None:
        """Wait until each has compared its memory, and beats. Blocking.

        Args:
            since: an instant after which it does.

        Raises:
            HostEnded, TimeoutError: it does not.
        """
        for line in self.guests.values():
            self.machine.wait_for(line, r"memory \d+ bad=0", since=since)
            self.machine.wait_for(line, r"\bbeat \d+", since=since)

    def guest_pauses(self, since: float) -> dict[str, GuestPause]:
        """What each guest says of the pause since an instant before it, once it compared its memory again. Blocking.

        Raises:
            HostEnded, TimeoutError: it says nothing.
            ValueError: it did not beat before, or not since.
        """
        now = time.monotonic()
        said = {vm: self.machine.wait_for(line, MEMORY, since=now).text for vm, line in self.guests.items()}
        return {
            vm: guest_pause(self.machine.lines(line), since, said[vm]) for vm, line in self.guests.items()
        }
