#!/usr/bin/env bash
# Every smoke test against one living Nox: 0 all ok, 1 something failed, 2 no target. The target: smoke_lib.sh.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
start=${EPOCHREALTIME/[.,]/}
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
# Side by side: most of their time is spent waiting for runs that must reach their timeout.
declare -A running
for name in test_health test_put test_run_py test_run_sh; do
  bash "$here/$name.sh" >"$output/$name" 2>&1 &
  running[$name]=$!
done
code=0
for name in test_health test_put test_run_py test_run_sh; do
  wait "${running[$name]}"
  result=$?
  cat "$output/$name"
  # Without a target no other test can run either.
  [[ $result != 2 ]] || exit 2
  [[ $result == 0 ]] || code=1
done
printf 'smoke: %d ok, %d failed, %d ms\n' "$(cat "$output"/* | grep -c '^ok ')" "$(cat "$output"/* | grep -c '^FAIL ')" \
  $(((${EPOCHREALTIME/[.,]/} - start) / 1000))
exit $code
