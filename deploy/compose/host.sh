#!/bin/sh
# A host in a container: the host updater, its pause guard (which it starts) and its VMs. When the updater dies, the
# VMs and the guard continue to run, as they do on a real host: so the updater is restarted beside them, not the container.
set -u
mkdir -p "$(dirname "$CAESURA_HOST_UPDATER_STATE_DIR")/workloads"
stopping="" updater="" told="" ran="" failures=0
MOST=5   # ends in a row, each soon after its start: the cause is in the container, which the engine restarts
SOON=60  # s

stop() {
  stopping=1
  # Once only: a second signal would kill it, and it has VMs to resume.
  [ -z "$updater" ] || [ -n "$told" ] || { kill -TERM "$updater" && told=1; }
}
trap stop TERM INT

say() { echo "caesura-host: $*" >&2; }

# In the background, so that a signal ends the waiting.
pause() {
  sleep "$1" &
  wait $!
}

while [ -z "$stopping" ]; do
  begun=$(date +%s)
  caesura-host-updater &
  updater=$!
  [ -z "$stopping" ] || stop # the signal arrived before there was an updater to stop
  wait "$updater"
  code=$?
  # A signal ends the wait, not the updater, whose own code is only told by another wait: also when it has ended meanwhile.
  while [ -n "$stopping" ]; do
    wait "$updater"
    again=$?
    [ "$again" != 127 ] || break # that was told before
    code=$again
    kill -0 "$updater" 2>/dev/null || break
  done
  updater=""
  [ -z "$stopping" ] || exit "$code"
  if [ "$code" = 2 ]; then
    # The configuration is wrong: starting again at once would change nothing. VMs of an earlier one would be lost
    # with the container.
    [ -n "$ran" ] || exit 2
    say "the updater cannot start, its reason is above; its VMs run on, it is tried again in 10 s"
    pause 10
    continue
  fi
  ran=1
  why="its reason is above"
  [ "$code" != 137 ] || why="it was killed, perhaps because memory ran out (docker inspect says OOMKilled)"
  [ $(($(date +%s) - begun)) -lt "$SOON" ] || failures=0
  failures=$((failures + 1))
  if [ "$failures" -ge "$MOST" ]; then
    say "the updater ended with $code, $why; that was $failures times in a row, so the container ends"
    exit 1
  fi
  say "the updater ended with $code, $why; it is started again"
  pause 1
done
exit 0
