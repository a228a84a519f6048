# Sourced by every finding: a folder that goes away at its end, and in it public packages at the versions named.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
cd "$work"    # no other package can be imported from where this was called
python=$work/venv/bin/python

install() {
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"
}
