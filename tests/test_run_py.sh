#!/usr/bin/env bash
# Run Python: output, input, errors, the timeout. How to name the target: smoke_lib.sh.
# shellcheck disable=SC2329 # `check` calls the functions

# shellcheck source-path=SCRIPTDIR source=smoke_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/smoke_lib.sh"

prints() {
  api_json /run_py '{"code": "print(6 * 7)"}' && status_is 200 && field_is status '"ok"' exit_code 0 stdout '"42\n"' stderr '""'
}

takes_input() {
  api_json /run_py '{"code": "import os, sys; print(sys.stdin.read(), sys.argv[1], os.environ[\"SMOKE\"])",
    "stdin": "in", "args": ["arg"], "env": {"SMOKE": "env"}}' &&
    status_is 200 && field_is status '"ok"' stdout '"in arg env\n"'
}

tells_exit_code() {
  api_json /run_py '{"code": "import sys; sys.exit(3)"}' && status_is 200 && field_is status '"error"' exit_code 3
}

sees_uploads() {
  local name=$UNIQUE.txt
  printf 'put before\n' >"$WORK/upload"
  put "$WORK/upload" "$name" && status_is 201 || return 1
  api_json /run_py "{\"code\": \"print(open('$name').read(), end='')\"}" && status_is 200 &&
    field_is stdout '"put before\n"'
}

stops_at_timeout() {
  local start=${EPOCHREALTIME/./} took
  api_json /run_py '{"code": "while True: pass", "timeout": 0.2}' && status_is 200 && field_is status '"timeout"' ||
    return 1
  took=$(((${EPOCHREALTIME/./} - start) / 1000))
  ((took < 10000)) && return 0
  WHY="the answer took $took ms, more than 10 s"
  return 1
}

refuses_without_token() {
  request "" POST /run_py --header 'Content-Type: application/json' --data-binary '{"code": "print(1)"}' &&
    status_is 401 && is_problem
}

check "print(6 * 7) is 42" prints
check "stdin, args and env arrive" takes_input
check "exit code 3 is an error with 3" tells_exit_code
check "an uploaded file can be read" sees_uploads
check "an endless loop is stopped after 0.2 s" stops_at_timeout
check "no token is a 401 problem" refuses_without_token
finish
