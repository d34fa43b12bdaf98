"""The last output of failed updates, from a rollout's state. Pure."""

from __future__ import annotations

from rich.text import Text

from caesura.contract.parts import WholeRollout


def failure_lines(rollout: WholeRollout) -> list[str]:
    """A line for each host on which the update failed, and the lines of its output; texts unchanged."""
    lines = []
    for wave in rollout.waves:
        for each in wave.failed_updates:
            code = "" if each.exit_code is None else f", exit code {each.exit_code}"
            output = each.output_tail.strip().splitlines()
            lines.append(
                f"{rollout.update} on {each.host}: {each.outcome}{code}"
                + (", last output:" if output else "")
            )
            lines += [f"  {line}" for line in output]
    return lines


def failures_view(rollout: WholeRollout, *, most: int = 0) -> list[Text]:
    """The same for a terminal.

    Args:
        most: the most lines, from the start and the end; 0: all.
    """
    lines = failure_lines(rollout)
    if most and len(lines) > most:
        command = f"  ... {len(lines) - most} lines: caesura history {rollout.rollout}"
        lines = [*lines[: most // 2], command, *lines[len(lines) - most + most // 2 :]]
    return [Text(line, style="dim" if line.startswith("  ") else "bold red") for line in lines]
