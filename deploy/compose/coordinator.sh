#!/bin/sh
# A coordinator in a container: with a store of its own, or with the one that several share once setup has noted that (profile ha).
set -eu
noted=/etc/caesura/coordinator-store
if [ -e "$noted" ]; then
  CAESURA_COORDINATOR_STORE=$(cat "$noted")
  CAESURA_COORDINATOR_STORE_PASSWORD_FILE=/etc/caesura/secrets/store
  export CAESURA_COORDINATOR_STORE CAESURA_COORDINATOR_STORE_PASSWORD_FILE
fi
exec caesura-coordinator "$@"
