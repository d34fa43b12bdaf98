#!/bin/sh
# A host in a container: the host updater, its pause guard (which it starts) and its VMs. When the updater dies, the
# VMs and the guard go on, as they do on a real host: so it is started again beside them, not the container.
set -u
mkdir -p /var/lib/caesura/workloads
stopping="" updater="" told=""

stop() {
  stopping=1
  # Once only: a second signal would kill it, and it has VMs to resume.
  [ -z "$updater" ] || [ -n "$told" ] || { kill -TERM "$updater" && told=1; }
}
trap stop TERM INT

while [ -z "$stopping" ]; do
  caesura-host-updater &
  updater=$!
  [ -z "$stopping" ] || stop # it came before there was somebody to tell
  wait "$updater"
  code=$?
  # A signal ends the wait, not the updater.
  while [ -n "$stopping" ] && kill -0 "$updater" 2>/dev/null; do
    wait "$updater"
    code=$?
  done
  updater=""
  [ -z "$stopping" ] || exit "$code"
  # 2: the configuration is wrong. Starting again would change nothing.
  [ "$code" != 2 ] || exit 2
  echo "caesura-host: the updater ended with $code, its reason is above; it is started again" >&2
  sleep 1
done
