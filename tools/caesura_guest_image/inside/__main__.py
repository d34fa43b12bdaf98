"""``main()`` with the argument ``heartbeat,memory``: one process per workload, forked from one interpreter."""

from __future__ import annotations

import os
import sys

from .parameters import Parameters, read_parameters

NAMES = ("clock", "heartbeat", "memory", "disk", "tcp", "approve")


def main() -> int:
    """Fork the workloads; ends when one of them ends, which should not happen."""
    names = sys.argv[1].split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.stderr.write(f"caesura: no workload {', '.join(unknown)}; there are {', '.join(NAMES)}\n")
        return 2
    with open("/proc/cmdline", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - start-up time
        parameters = read_parameters(file.read())
    children = {_start(name, parameters): name for name in names}
    pid, status = os.wait()
    sys.stderr.write(f"caesura: workload {children[pid]} ended with {os.waitstatus_to_exitcode(status)}\n")
    for other in children:
        if other != pid:
            os.kill(other, 9)
    return 1


def _start(name: str, parameters: Parameters) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        # Not importlib: importing it takes longer than everything here.
        __import__(f"{__package__}.{name}")
        sys.modules[f"{__package__}.{name}"].run(parameters)
    except BaseException:  # noqa: BLE001 - the child's end of the line: said on the console
        import traceback  # noqa: PLC0415 - slow, and only needed here

        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
