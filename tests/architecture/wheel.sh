#!/bin/sh
# The built wheel, installed alone in the environment $1, of which nothing of the checkout may be on the path.
set -eu
venv=$1
cd "$(dirname "$0")/../.."
where=$("$venv/bin/python" -c 'import caesura, caesura_coordinator; print(caesura.__file__, caesura_coordinator.__file__)')
case "$where" in
  *"$venv"*"$venv"*) ;;
  *) echo "the wheel is not what is tested: $where" >&2; exit 1 ;;
esac
commands=$("$venv/bin/python" -c 'from importlib.metadata import distribution as d; print(*(e.name for e in d("caesura").entry_points if e.group == "console_scripts"))')
for command in ${commands:?the wheel has no commands}; do
  "$venv/bin/$command" --help >/dev/null || { echo "$command --help failed" >&2; exit 1; }
done
"$venv/bin/python" tests/architecture/installed.py
