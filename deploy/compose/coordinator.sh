#!/bin/sh
# The coordinator of docker-compose.yml. Its store is SQLite until the profile `ha` is started, which leaves a mark; from then on it is
# PostgreSQL, and stays so: a fleet has one store. A coordinator that runs with SQLite when the mark is made ends, and the engine starts it again.
# caesura-compose-coordinator MARK STORE PASSWORD_FILE
set -u
mark=$1 store=$2 password=$3
coordinator="" stopping=""

say() { echo "caesura-compose-coordinator: $*" >&2; }

stop() {
  stopping=1
  [ -z "$coordinator" ] || kill -TERM "$coordinator" 2>/dev/null
}
trap stop TERM INT

if [ ! -d "${mark%/*}" ]; then
  say "${mark%/*} is not mounted, so it is not known which store this fleet has"
  exit 2
fi
if [ -e "$mark" ]; then
  export CAESURA_COORDINATOR_STORE="$store" CAESURA_COORDINATOR_STORE_PASSWORD_FILE="$password"
  exec caesura-coordinator
fi

caesura-coordinator &
coordinator=$!
[ -z "$stopping" ] || stop # the signal arrived before there was a coordinator to stop
(
  trap - TERM INT
  while [ ! -e "$mark" ]; do sleep 1; done
  say "this fleet has a store in PostgreSQL from now on: the coordinator is started again, with that one"
  kill -TERM "$coordinator"
) &
watcher=$!
wait "$coordinator"
code=$?
# A signal ends the wait, not the coordinator, whose own code is only told by another wait: also when it has ended in the meantime.
while [ -n "$stopping" ]; do
  wait "$coordinator"
  again=$?
  [ "$again" != 127 ] || break # that was told before
  code=$again
  kill -0 "$coordinator" 2>/dev/null || break
done
kill "$watcher" 2>/dev/null
exit "$code"
