#!/usr/bin/env bash
# Upload, read back, overwrite, delete, and no way out of the sandbox. How to name the target: smoke_lib.sh.
# shellcheck disable=SC2329 # `check` calls the functions

# shellcheck source-path=SCRIPTDIR source=smoke_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/smoke_lib.sh"

NAME=$UNIQUE.bin
FIRST=$WORK/first SECOND=$WORK/second
# Bytes that are neither text nor short: every line end and NUL has to survive.
head -c 100000 /dev/urandom >"$FIRST"
printf 'second\r\n\0\n' >"$SECOND"

digest() {
  sha256sum "$1" | cut -d ' ' -f 1
}

puts() {
  put "$FIRST" "$NAME" && status_is 201 && field_is path "\"$NAME\"" size 100000 sha256 "\"$(digest "$FIRST")\""
}

gets_back() {
  api GET "/files/$NAME" && status_is 200 || return 1
  cmp -s "$BODY" "$1" && return 0
  WHY="$(wc -c <"$BODY") bytes came back, not the ones that were put"
  return 1
}

lists() {
  api GET /files && status_is 200 || return 1
  # A list of very many files is cut.
  grep -qF -- "\"$NAME\"" "$BODY" || field_is truncated true && return 0
  WHY="$NAME is not in the list"
  return 1
}

refuses_existing() {
  put "$SECOND" "$NAME" && status_is 409 && is_problem && gets_back "$FIRST"
}

overwrites() {
  put "$SECOND" "$NAME" true && status_is 201 && field_is sha256 "\"$(digest "$SECOND")\"" && gets_back "$SECOND"
}

refuses_escape() {
  local path=$1 sandbox
  put "$SECOND" "$path" true && status_is 400 403 422 && is_problem && not_listed "$UNIQUE-escape" || return 1
  # On the host itself, look at the place that it aimed at too.
  if [[ -r $NOX_CONFIG ]]; then
    sandbox=$(setting NOX_SANDBOX)
    if [[ -e ${sandbox:-/home/nox/nox/sandbox}/$path || -e /tmp/$UNIQUE-escape ]]; then
      WHY="$path was written outside the sandbox"
      return 1
    fi
  fi
}

refuses_without_token() {
  request "" POST /put --form "file=@$SECOND" --form-string "path=$UNIQUE-stranger" && status_is 401 &&
    is_problem && not_listed "$UNIQUE-stranger"
}

deletes() {
  api DELETE "/files/$NAME" && status_is 200 204 && api GET "/files/$NAME" && status_is 404 && is_problem
}

check "PUT answers 201 with path, size and sha256" puts
check "GET brings the same bytes back" gets_back "$FIRST"
check "the list has it" lists
check "an existing file is a 409 and stays" refuses_existing
check "overwrite=true replaces it" overwrites
check "../ is refused and nothing is written" refuses_escape "../$UNIQUE-escape"
check "an absolute path is refused and nothing is written" refuses_escape "/tmp/$UNIQUE-escape"
check "no token is a 401 problem and nothing is written" refuses_without_token
check "DELETE removes it" deletes
finish
