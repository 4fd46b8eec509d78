#!/usr/bin/env bash
# Makes .venv with everything the demo and the tests need on a machine without GPU. Does nothing when it is current.
# `make_env.sh requirements` leaves this package out (for an image layer that outlives changes of the code).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" - <<'PY' || exit 1
import sys
if sys.version_info[:2] != (3, 11):
    sys.exit(f"Python 3.11 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11 ...")
PY
stamp=.venv/.made-from
package=setup.py
[ "${1:-}" != requirements ] || package=/dev/null
wanted=$(cat "$package" tools/requirements-cpu.txt tools/requirements-cpu.lock tools/make_env.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
torch=$(grep '^torch==' tools/requirements-cpu.txt)
echo "Installing into .venv ($torch and SGLang's CPU parts: about 2.0 GB on disk) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }
# Exactly the lock's packages, as files with the content that it names (`make lock` writes it). Without --no-deps some of
# them would pull CUDA.
pip --no-deps --require-hashes --only-binary :all: -r tools/requirements-cpu.lock
# torch's CPU build from wherever pip finds it, else from PyTorch's own index; the lock says why it is not in the lock
pip --no-deps "$torch" 2>/dev/null || pip --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
if [ "${1:-}" = requirements ]; then exit 0; fi
pip --no-deps --no-build-isolation -e .
echo "$wanted" > "$stamp"
