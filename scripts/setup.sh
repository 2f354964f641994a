#!/usr/bin/env bash
# Bring .venv up to date with requirements.lock, then install Trunkline itself, editable.
#
# Idempotent: does nothing when .venv was made from the same inputs. Needs Python 3.11 or later and
# one of: uv on PATH, the venv module, pip (tried in this order). PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.made-from
inputs() { pwd; cat requirements.lock pyproject.toml scripts/setup.sh; }
sum=$(inputs | cksum)
if [[ -x .venv/bin/trunkline && -f $stamp && $(<"$stamp") == "$sum" ]]; then
    exit 0
fi

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later found (tried: ${PYTHON:-python3.11, python3, python3.12 to python3.14})" \
        "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

# The lines of requirements.lock that pin uv: one version, its hashes.
locked_uv() { awk '/^[a-z]/ { inside = /^uv==/ } inside && !/^ *#/' requirements.lock; }

has() { "$python" -c "import $1" 2>/dev/null; }

# Set `uv` to a usable uv; makes .venv on the way where that is how uv is got.
get_uv() {
    if [[ -x .venv/bin/python && -x .venv/bin/uv ]]; then
        uv=.venv/bin/uv
        return
    fi
    if command -v uv >/dev/null; then
        uv=uv
        return
    fi
    if ! has ensurepip && ! has pip && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "setup: this Python has neither venv nor pip; installing python3-venv"
        apt-get update -qq && apt-get install -y -qq python3-venv
    fi
    if has ensurepip; then
        [[ -x .venv/bin/pip ]] || "$python" -m venv --clear .venv
        [[ -x .venv/bin/uv ]] ||
            .venv/bin/python -m pip install --quiet --root-user-action ignore --require-hashes -r <(locked_uv)
        uv=.venv/bin/uv
    elif has pip; then
        # --target leaves the system's own packages alone.
        "$python" -m pip install --quiet --root-user-action ignore --upgrade \
            --target .bootstrap --require-hashes -r <(locked_uv)
        uv=.bootstrap/bin/uv
    else
        fail "$python has neither the venv module nor pip, and uv is not on PATH" \
            "on Debian or Ubuntu: sudo apt-get install python3-venv    (or install uv)"
    fi
}

python=$(find_python)
get_uv
if [[ ! -x .venv/bin/python ]]; then
    "$uv" venv --quiet --allow-existing --python "$("$python" -c 'import sys; print(sys.executable)')" .venv
fi

export VIRTUAL_ENV=$PWD/.venv
"$uv" pip sync --quiet --compile-bytecode --require-hashes requirements.lock
"$uv" pip install --quiet --no-deps --no-build-isolation --editable .
rm -rf .bootstrap
echo "$sum" >"$stamp"
echo "setup: .venv is ready ($(.venv/bin/python --version))"
