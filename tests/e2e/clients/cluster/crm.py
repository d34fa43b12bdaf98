"""Stands in for Pacemaker's commands, which the resource agent calls: a cluster of two nodes whose attributes are in one file.

Called as crm_attribute, crm_node, crm_resource or crm_simulate.
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

STATE = Path(os.environ["CRM_STATE"])
NODES = (os.environ["CRM_NODE"], "other-node")


def main(command: str, arguments: list[str]) -> None:
    """One call."""
    if command == "crm_node":
        print("\n".join(f"{number} {name} member" for number, name in enumerate(NODES, 1)))
    elif command == "crm_simulate":
        print("Transition Summary:", end="")
    elif command == "crm_attribute":
        attribute(arguments)


def attribute(arguments: list[str]) -> None:
    """crm_attribute --name N [--node N] --query | --update V | --delete."""
    given = dict(pairwise(arguments))
    key = f"{given.get('--node', '')}/{given['--name']}"
    known = json.loads(STATE.read_text()) if STATE.exists() else {}
    if "--query" in arguments:
        print(known.get(key, given.get("--default", "")))
        return
    if "--delete" in arguments:
        known.pop(key, None)
    else:
        known[key] = given["--update"]
    STATE.write_text(json.dumps(known))


if __name__ == "__main__":
    main(Path(sys.argv[0]).name, sys.argv[1:])
