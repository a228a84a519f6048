# Sourced by scripts/demo and scripts/test: a virtual environment of the project's own, with everything installed.
# GGUF_PAGER_VENV names another place for it.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

need() {
    command -v "$1" >/dev/null 2>&1 || { say "$1 is missing. On Debian or Ubuntu: sudo apt-get install $2"; exit 1; }
}

find_python() {
    for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 || continue
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && { echo "$python"; return; }
    done
    say "Python 3.11 or newer is missing. On Debian or Ubuntu: sudo apt-get install python3 python3-venv python3-dev"
    exit 1
}

make_environment() {
    need cc build-essential
    need c++ build-essential
    venv=${GGUF_PAGER_VENV:-$root/.venv}
    if [ ! -x "$venv/bin/python" ]; then
        base_python=$(find_python)
        say "Making a virtual environment in $venv"
        "$base_python" -m venv "$venv" \
            || { say "venv is missing. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
    fi
    python=$venv/bin/python
}

with_clock() {          # runs a command; on a terminal the time goes on meanwhile
    if [ ! -t 2 ]; then
        "$@"
        return
    fi
    "$@" &
    local job=$! seconds=0 status=0
    trap 'kill $job 2>/dev/null; exit 130' INT TERM     # a job in the background does not hear of a Ctrl-C
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        printf '\r  %d:%02d ' $((seconds / 60)) $((seconds % 60)) >&2
    done
    printf '\r          \r' >&2
    wait "$job" || status=$?
    trap - INT TERM
    return $status
}

install_project() {     # $1: extras, such as [test]
    if ! "$python" -c 'import llama_cpp' >/dev/null 2>&1; then
        say "Setting up: builds llama-cpp-python, about 5 minutes on 2 cores, once"
    else
        say "Setting up: a few seconds"
    fi
    with_clock "$python" -m pip install -qq --disable-pip-version-check --editable "$root$1"
}
