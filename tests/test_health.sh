#!/usr/bin/env bash
# GET /health, with and without a token. How to name the target: smoke_lib.sh.
# shellcheck disable=SC2329 # `check` calls the functions

# shellcheck source-path=SCRIPTDIR source=smoke_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/smoke_lib.sh"

answers() {
  request "" GET /health && status_is 200 && field_is status '"ok"'
}

hides_detail() {
  request "" GET /health && status_is 200 || return 1
  # Strangers learn that it lives and which version, nothing of its limits or load.
  WHY=$(python3 -I - "$BODY" 2>&1 <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    more = set(json.load(file)) - {"status", "version"}
sys.exit(f"told without a token: {sorted(more)}" if more else 0)
PYTHON
  )
}

tells_detail() {
  local without
  request "" GET /health && status_is 200 || return 1
  without=$(wc -c <"$BODY")
  api GET /health && status_is 200 || return 1
  (($(wc -c <"$BODY") > without)) && return 0
  WHY="the token brings no detail: $(head -c 300 "$BODY")"
  return 1
}

refuses_without_token() {
  request "" GET /files && status_is 401 && is_problem && field_is status 401
}

check "GET /health answers ok" answers
check "GET /health tells strangers no detail" hides_detail
check "GET /health tells detail to the token" tells_detail
check "no token is a 401 problem" refuses_without_token
finish
