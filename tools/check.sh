#!/usr/bin/env bash
# Every check and test, on a fresh machine too: bash tools/check.sh
# PATCHREG_GOLDEN=DIR: read the full set of reference numbers instead of the compact one in tests/golden.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
# A full disk shows as odd failures at the end of the tests, so it is said at the start.
free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
wanted=$([ -x "${VENV:-.venv}/bin/python" ] && echo 3 || echo 10)
if [ "$free" -lt "$wanted" ]; then
    echo "error: $free GB free on this disk; the environment and the tests need $wanted GB" >&2
    exit 2
fi
# CUDA sources must compile wherever there is a compiler for them, GPU or not.
if command -v nvcc >/dev/null; then
    export PATCHREG_BUILD_CUDA=1
fi
make_environment "[dev]"

if command -v c++ >/dev/null; then
    say "region ops"
    PATCHREG_OPS=require python - <<'PYTHON_CODE'
import os, shutil, sys
import patchreg_ops, torch
info = patchreg_ops.build_info()
wanted = ["cpu"] + (["cuda"] if shutil.which("nvcc") and torch.version.cuda else [])
missing = [kind for kind in wanted if not info[kind]]
sys.exit(f"compiled region ops are missing for {missing}: {info}" if missing else 0)
PYTHON_CODE
fi
say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "metafiles and generated pages"
python tools/zoo.py --check
say "tests"
OMP_NUM_THREADS=1 python -m pytest -n "${PATCHREG_TEST_PROCESSES:-2}" --dist loadfile
say "all checks passed"
