"""Programs that let somebody else run what they are given, so that freezing their own process freezes nothing. Pure.

A process VM is what is below its first process. A client of a daemon (``docker run``) is that, and the container is the
daemon's; ``podman`` and ``systemd-run`` put what they start into a cgroup of its own. Both would be called paused and
run on. What is hidden in a program of one's own cannot be known from its name: after each freeze the driver looks at
where the VM's processes are (``freezers.outside``), and what a daemon runs nobody can see.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePath

_DAEMONS = {
    **dict.fromkeys(
        ("docker", "docker-compose", "nerdctl", "ctr", "crictl", "podman-remote"), "its container daemon"
    ),
    **dict.fromkeys(("kubectl", "oc", "nomad"), "a cluster"),
    **dict.fromkeys(("lxc", "incus", "lxc-start", "machinectl", "multipass"), "its own service"),
    **dict.fromkeys(("virsh", "virt-install", "vagrant"), "libvirtd"),
    **dict.fromkeys(("systemctl", "service", "systemd-run"), "systemd"),
    **dict.fromkeys(("podman", "buildah", "runc", "crun"), "a cgroup of its own"),
    **dict.fromkeys(("at", "batch", "crontab"), "a daemon, later"),
    **dict.fromkeys(("ssh", "mosh", "rsh"), "another machine"),
    **dict.fromkeys(("tmux",), "its server, which may run already"),
}
"""Program to who runs what it is given."""

_WRAPPERS = frozenset(
    (
        *(
            "env",
            "nice",
            "ionice",
            "chrt",
            "taskset",
            "numactl",
            "nohup",
            "setsid",
            "stdbuf",
            "timeout",
            "time",
        ),
        *(
            "sudo",
            "doas",
            "runuser",
            "setpriv",
            "chroot",
            "unshare",
            "flock",
            "dumb-init",
            "tini",
            "exec",
            "command",
        ),
    )
)
_SHELLS = frozenset(("sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"))
_ENDS_COMMAND = frozenset((";", "&", "&&", "|", "||", "(", ")", "{", "}", "then", "do", "else", "!", "\n"))


def hands_over(argv: Sequence[str]) -> str:
    """Why a process of these words is not what would be frozen, for people; empty if nothing says so.

    Looks through programs that run another one in their place (``env``, ``nice``, ``sudo``), and through ``sh -c``.
    """
    for program in _programs(list(argv)):
        who = _DAEMONS.get(PurePath(program).name)
        if who is not None:
            return (
                f"runs {program!r}, which hands what it is given to {who}: freezing it would freeze nothing; "
                "give the argv of the program itself"
            )
    return ""


def _programs(words: list[str]) -> Iterator[str]:
    """What stands where a program is named."""
    while words:
        name = PurePath(words[0]).name
        yield words[0]
        if name in _SHELLS and name != "busybox":
            yield from _of_script(words[1:])
            return
        if name not in _WRAPPERS and name != "busybox":
            return
        # Options, their values and NAME=value come before the program. Which options have a value only the wrapper
        # knows: a word behind one may be the value or the program, so it is taken for both.
        words = words[1:]
        after_option = False
        while words and (words[0].startswith("-") or "=" in words[0] or _is_value(words[0]) or after_option):
            if after_option and not words[0].startswith("-"):
                yield from _programs(words)
            after_option = words[0].startswith("-") and words[0] != "--"
            words = words[1:]


def _is_value(word: str) -> bool:
    return word[:1].isdigit()


def _of_script(words: list[str]) -> Iterator[str]:
    """The programs of what follows ``-c``."""
    for number, word in enumerate(words):
        if not word.startswith("-"):
            return  # a script's file
        if word.endswith("c") and not word.startswith("--") and number + 1 < len(words):
            yield from _of_line(words[number + 1])
            return


def _of_line(line: str) -> Iterator[str]:
    try:
        found = list(shlex.shlex(line.replace("\n", " ; "), posix=True, punctuation_chars=True))
    except ValueError:  # no shell would run it either
        return
    command: list[str] = []
    for word in (*found, ";"):
        if word in _ENDS_COMMAND or set(word) <= set(";&|()"):
            if command:
                yield from _programs(command)
            command = []
        else:
            command.append(word)
