#!/usr/bin/env bash
# Every check and test, on a fresh machine too: bash tools/check.sh
# PATCHREG_GOLDEN=DIR: read the full set of reference numbers instead of the compact one in tests/golden.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
make_environment "[dev]"

if command -v c++ >/dev/null; then
    say "region ops"
    PATCHREG_OPS=require python -c 'import patchreg_ops'
fi
say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "tests"
OMP_NUM_THREADS=1 python -m pytest -n "${PATCHREG_TEST_PROCESSES:-2}" --dist loadfile
say "all checks passed"
