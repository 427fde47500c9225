#!/usr/bin/env bash
# What the other scripts share: common.sh SET [key=value ...] samples with configs/SET/sample.yaml, from the
# repository's root wherever it is called, with the first Python that has the packages (PYTHON=... chooses one).
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
set_name=$1
shift

for python in ${PYTHON:+"$PYTHON"} python python3 .venv/bin/python; do
  if "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("diffusers") is None)' 2>/dev/null; then
    exec "$python" sample/sample.py --config "configs/$set_name/sample.yaml" "$@"
  fi
done
echo "sample: no Python here has the project's packages: run 'make env' in the repository, or set PYTHON." >&2
exit 1
