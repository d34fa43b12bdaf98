#!/bin/sh
# Shows a rollout that outlives its coordinator, on this machine. deploy/try-high-availability.sh --help
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help)
    cat <<'HELP'
usage: deploy/try-high-availability.sh

Starts a broker, a PostgreSQL, two coordinators that share it and two hosts with a VM each, in a temporary folder; starts a rollout,
kills the coordinator that leads while the first VM is paused, and shows how the other one continues. Takes half a minute, and
leaves nothing behind. Needs Debian's packages mosquitto and postgresql.

exit codes: 0 the rollout completed, 1 it did not, 2 something is missing
HELP
    exit 0
    ;;
  '') ;;
  *) echo "try-high-availability: no option $1; see --help" >&2; exit 2 ;;
esac

. deploy/bootstrap.sh
find_uv
sync_environment --extra postgresql
exec .venv/bin/python -m caesura_testing.high_availability
