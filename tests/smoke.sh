#!/usr/bin/env bash
# Every smoke test against one living Nox: 0 all ok, 1 something failed, 2 no target. The target: smoke_lib.sh.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
start=${EPOCHREALTIME/[.,]/}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
code=0
for name in test_health test_put test_run_py test_run_sh; do
  bash "$here/$name.sh" | tee -a "$output"
  result=${PIPESTATUS[0]}
  # Without a target no other test can run either.
  [[ $result != 2 ]] || exit 2
  [[ $result == 0 ]] || code=1
done
printf 'smoke: %d ok, %d failed, %d ms\n' "$(grep -c '^ok ' "$output")" "$(grep -c '^FAIL ' "$output")" \
  $(((${EPOCHREALTIME/[.,]/} - start) / 1000))
exit $code
