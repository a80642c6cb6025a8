# shellcheck shell=bash
# What the smoke tests share: the target, requests to it, checks, clean-up. Sourced, not run.
#
# The target comes from the environment:
#   NOX_URL    https://host, or http://127.0.0.1:8080 on the host itself
#   NOX_TOKEN  the bearer token
#   NOX_CA     a PEM file with the authority that signed the host's certificate (default: the system's)
# What isn't given is read from the host's own configuration, which takes root.
#
# The token never appears in an argument list, in a child's environment, or in the output.

set -uo pipefail
export LC_ALL=C

NOX_CONFIG=${NOX_CONFIG:-/etc/default/nox-api}
SMOKE_NAME=$(basename "$0" .sh)
SMOKE_OK=0
SMOKE_FAILED=0
SMOKE_START=${EPOCHREALTIME/./}
# Every name that a test leaves in the sandbox starts with this, and no other run of it does.
# shellcheck disable=SC2034 # the tests use it
UNIQUE="smoke-$SMOKE_NAME-$$-${EPOCHREALTIME/./}"
CREATED=()

# Print a message and end with 2: the tests could not be run.
give_up() {
  printf '%s: %s\n' "$SMOKE_NAME" "$1" >&2
  exit 2
}

# Print one setting of the configuration, without its quotes.
setting() {
  sed -nE "s/^[[:space:]]*(export[[:space:]]+)?$1=[\"']?([^\"'#[:space:]]*).*/\2/p" "$NOX_CONFIG" | tail -n 1
}

find_target() {
  local address port
  if [[ -z ${NOX_TOKEN:-} && -r $NOX_CONFIG ]]; then
    NOX_TOKEN=$(setting NOX_API_TOKEN)
  fi
  if [[ -z ${NOX_URL:-} && -r $NOX_CONFIG ]]; then
    address=$(setting NOX_BIND_ADDR)
    port=$(setting NOX_PORT)
    case ${address:=127.0.0.1} in
      0.0.0.0) address=127.0.0.1 ;;
      ::) address='[::1]' ;;
      *:*) address="[$address]" ;;
    esac
    NOX_URL="http://$address:${port:-8080}"
  fi
  if [[ -z ${NOX_URL:-} || -z ${NOX_TOKEN:-} ]]; then
    give_up "no target: set NOX_URL and NOX_TOKEN (and NOX_CA), or run as root on a host with $NOX_CONFIG"
  fi
  if [[ -n ${NOX_CA:-} && ! -r $NOX_CA ]]; then
    give_up "NOX_CA=$NOX_CA is not readable"
  fi
  NOX_URL=${NOX_URL%/}
  # curl gets the token through a pipe alone.
  export -n NOX_TOKEN
}

# Send a request with the token. Usage: api METHOD PATH [curl options]; sets STATUS, the answer is in BODY and HEAD.
api() {
  request "$NOX_TOKEN" "$@"
}

# Send a request with any token, or without one ("").
request() {
  local token=$1 method=$2 path=$3 attempt
  shift 3
  # -q: no .curlrc, which could switch off the verification of certificates.
  local options=(-q --silent --show-error --max-time 30 --request "$method" --dump-header "$HEAD" --output "$BODY"
    --write-out '%{http_code}')
  [[ -z ${NOX_CA:-} ]] || options+=(--cacert "$NOX_CA")
  [[ $NOX_URL != http://127.* && $NOX_URL != 'http://[::1]'* ]] || options+=(--noproxy '*')
  for attempt in 1 2 3; do
    : >"$BODY"
    if [[ -n $token ]]; then
      STATUS=$(curl "${options[@]}" "$@" --header @<(printf 'Authorization: Bearer %s\n' "$token") "$NOX_URL$path" 2>"$ERROR")
    else
      STATUS=$(curl "${options[@]}" "$@" "$NOX_URL$path" 2>"$ERROR")
    fi || {
      WHY=$(head -n 1 "$ERROR")
      STATUS=000
      return 1
    }
    # A living Nox may be busy; that is no failure of what is tested here.
    [[ $STATUS == 429 && $attempt != 3 ]] || return 0
    sleep 1
  done
}

# POST a JSON document. Usage: api_json PATH DOCUMENT
api_json() {
  api POST "$1" --header 'Content-Type: application/json' --data-binary "$2"
}

# Upload a file. Usage: put LOCAL-FILE REMOTE-PATH [overwrite]; removed at the end.
put() {
  api POST /put --form "file=@$1" --form-string "path=$2" --form-string "overwrite=${3:-false}"
  # Also after no answer at all: it may have been written.
  [[ $STATUS != 201 && $STATUS != 000 ]] || CREATED+=("$2")
  [[ $STATUS != 000 ]]
}

# Does the last answer have this status, or one of these? Usage: status_is 400 422
status_is() {
  [[ " $* " == *" $STATUS "* ]] && return 0
  WHY="status $STATUS instead of $*: $(head -c 300 "$BODY")"
  return 1
}

# Do fields of the last answer (a JSON object) have these values, written as JSON?
# Usage: field_is status '"ok"' exit_code 0
field_is() {
  WHY=$(python3 -I -S - "$BODY" "$@" 2>&1 <<'PYTHON'
import json, sys
body, *pairs = sys.argv[1:]
name = ""
try:
    with open(body, encoding="utf-8") as file:
        document = json.load(file)
    for name, wanted in zip(pairs[::2], pairs[1::2]):
        if document[name] != json.loads(wanted):
            sys.exit(f"{name} is {json.dumps(document[name])[:200]} instead of {wanted[:200]}")
except (ValueError, KeyError, TypeError) as error:
    sys.exit(f"no field {name} in the answer: {error!r}")
PYTHON
  )
}

# Is the last answer an RFC 9457 problem?
is_problem() {
  grep -qi '^content-type: *application/problem+json' "$HEAD" && return 0
  WHY="not application/problem+json: $(grep -i '^content-type' "$HEAD")"
  return 1
}

# Is this name absent from the list of files, at any depth?
not_listed() {
  api GET /files && status_is 200 || return 1
  ! grep -qF -- "$1" "$BODY" && return 0
  WHY="$1 was written"
  return 1
}

# Run one check and print its line. Usage: check TITLE FUNCTION [arguments]
check() {
  local title=$1 start=${EPOCHREALTIME/./} state=FAIL
  shift
  WHY=""
  if "$@"; then
    state=ok
    SMOKE_OK=$((SMOKE_OK + 1))
  else
    SMOKE_FAILED=$((SMOKE_FAILED + 1))
  fi
  printf '%-4s %6d ms  %s\n' "$state" "$(((${EPOCHREALTIME/./} - start) / 1000))" "$title"
  [[ $state == ok ]] || printf '                 %s\n' "${WHY:-no reason known}"
}

# Print the summary and end: 0 if every check was ok.
finish() {
  local took=$(((${EPOCHREALTIME/./} - SMOKE_START) / 1000))
  printf '%s: %d ok, %d failed, %d ms\n' "$SMOKE_NAME" "$SMOKE_OK" "$SMOKE_FAILED" "$took"
  [[ $SMOKE_FAILED == 0 ]]
  exit
}

# Leave nothing behind, neither here nor in the sandbox.
clean_up() {
  local path
  for path in "${CREATED[@]}"; do
    api DELETE "/files/$path" >/dev/null 2>&1
  done
  rm -rf "$WORK"
}

find_target
WORK=$(mktemp -d)
BODY=$WORK/body HEAD=$WORK/head ERROR=$WORK/error
trap clean_up EXIT
trap 'exit 130' INT TERM
