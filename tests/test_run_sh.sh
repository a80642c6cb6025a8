#!/usr/bin/env bash
# Run shell commands: output, pipes, errors, the timeout. How to name the target: smoke_lib.sh.
# shellcheck disable=SC2329 # `check` calls the functions

# shellcheck source-path=SCRIPTDIR source=smoke_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/smoke_lib.sh"

prints() {
  api_json /run_sh '{"cmd": "printf %s hello | tr a-z A-Z; echo wrong >&2"}' && status_is 200 &&
    field_is status '"ok"' && field_is exit_code 0 && field_is stdout '"HELLO"' && field_is stderr '"wrong\n"'
}

takes_input() {
  # shellcheck disable=SC2016 # the sandbox's shell expands it
  api_json /run_sh '{"cmd": "cat; echo \"$SMOKE\"", "stdin": "in ", "env": {"SMOKE": "env"}}' && status_is 200 &&
    field_is status '"ok"' && field_is stdout '"in env\n"'
}

tells_exit_code() {
  api_json /run_sh '{"cmd": "exit 3"}' && status_is 200 && field_is status '"error"' && field_is exit_code 3
}

keeps_files() {
  local name=$UNIQUE.txt
  CREATED+=("$name")
  api_json /run_sh "{\"cmd\": \"echo kept > $name\"}" && status_is 200 && field_is status '"ok"' &&
    api GET "/files/$name" && status_is 200 || return 1
  [[ $(<"$BODY") == kept ]] && return 0
  WHY="what the run wrote did not come back"
  return 1
}

stops_at_timeout() {
  local start=${EPOCHREALTIME/./} took
  api_json /run_sh '{"cmd": "sleep 30", "timeout": 1}' && status_is 200 && field_is status '"timeout"' || return 1
  took=$(((${EPOCHREALTIME/./} - start) / 1000))
  ((took < 10000)) && return 0
  WHY="the answer took $took ms, more than 10 s"
  return 1
}

refuses_wrong_token() {
  request "wrong-$UNIQUE" POST /run_sh --header 'Content-Type: application/json' --data-binary '{"cmd": "true"}' &&
    status_is 401 && is_problem
}

check "a pipe prints to stdout and stderr" prints
check "stdin and env arrive" takes_input
check "exit code 3 is an error with 3" tells_exit_code
check "a file that it wrote stays" keeps_files
check "sleep 30 is stopped after 1 s" stops_at_timeout
check "a wrong token is a 401 problem" refuses_wrong_token
finish
