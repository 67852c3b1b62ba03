# shellcheck shell=bash
# Sourced, with the name of an extra of pyproject.toml, by the scripts beside it:
#
#     source launch/environment.sh demo
#
# Makes .venv at the root of the repository where it is missing, installs the package (editable) with that extra at
# the versions of constraints.txt, changes to the root, and sets `python` to the interpreter of that environment.
# Where nothing has changed since the last time, it installs nothing.

extra="$1"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || return

# An empty TORCH_LOGS makes `import torch` 2.13 fail.
if [[ -z "${TORCH_LOGS:-}" ]]; then
    unset TORCH_LOGS
fi
# A PYTHONPATH or PYTHONHOME of another project would be looked through before this environment.
unset PYTHONPATH PYTHONHOME

python="$PWD/.venv/bin/python"
stamp=".venv/.installed-$extra"

# The root is part of the stamp: an editable install names it, so a moved checkout has to be installed again.
wanted="$({ echo "$PWD"; cat pyproject.toml launch/constraints.txt; } | cksum)"

if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
    # Asking for pip, not for the file: a creation that was interrupted leaves an interpreter without it.
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        echo "environment: creating $PWD/.venv"
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "expected python3 to be Python 3.10 or newer, got: $(python3 --version 2>&1); install one" >&2
            exit 1
        fi
        python3 -m venv --clear .venv
    fi
    echo "environment: installing sharded-adamax[$extra] into $PWD/.venv (minutes, the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check \
        --editable ".[$extra]" --constraint launch/constraints.txt
    echo "$wanted" >"$stamp"
fi
echo "environment: $("$python" --version), torch $("$python" -c 'from importlib.metadata import version; print(version("torch"))')"
