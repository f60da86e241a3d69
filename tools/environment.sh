# Sourced by quickstart.sh and check.sh: a virtual environment with the tested versions.
# PYTHON: interpreter to use (default python3). VENV: folder of the environment (default .venv).
# PATCHREG_BUILD_CUDA: 1 compiles the CUDA kernels, 0 leaves them out (default: 1 where a GPU is visible).
# PATCHREG_TORCHSORT=1: build the optional torchsort too.

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

make_environment() { # make_environment EXTRAS
    local python=${PYTHON:-python3} venv=${VENV:-.venv}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $("$python" --version 2>&1) is too old; set PYTHON to a Python >= 3.10" >&2
        exit 2
    fi
    if [ ! -x "$venv/bin/python" ]; then
        say "making the environment $venv"
        "$python" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    local done_mark="$venv/.installed$1"
    # Sources of the compiled ops count too: a library older than they are must not be tested.
    if [ -e "$done_mark" ] &&
        [ -z "$(find setup.py tools/constraints.txt ops/csrc -newer "$done_mark" -print -quit)" ]; then
        echo "already installed in $venv (remove $done_mark to install again)"
        return
    fi
    say "installing (torch and torchvision from one index, then patchreg with its ops)"
    python -m pip install -q -c tools/constraints.txt -U pip setuptools wheel ninja
    python -m pip install -q -c tools/constraints.txt torch torchvision
    if [ -z "${PATCHREG_BUILD_CUDA:-}" ]; then
        PATCHREG_BUILD_CUDA=$(python -c 'import torch; print(int(torch.cuda.is_available()))')
        export PATCHREG_BUILD_CUDA
    fi
    python -m pip install -q -c tools/constraints.txt --no-build-isolation -e ".$1"
    python - <<'PYTHON_CODE'
import patchreg_ops, torch
info = patchreg_ops.build_info()
kinds = [kind for kind in ("cpu", "cuda") if info[kind]] or ["none: the reference path in PyTorch runs"]
print(f"torch {torch.__version__}, GPU {torch.cuda.is_available()}, compiled region ops: {', '.join(kinds)}")
PYTHON_CODE
    install_torchsort
    touch "$done_mark"
}

# torchsort comes as source only. It compiles for the CPU when no nvcc is in sight; with nvcc on PATH it wants the
# toolkit's headers and an architecture list. Everything works without it: the soft rank has a PyTorch path.
install_torchsort() {
    if python -c 'import torchsort' 2>/dev/null; then
        echo "torchsort: installed"
    elif [ "${PATCHREG_TORCHSORT:-0}" != 1 ]; then
        echo "torchsort: not installed (optional; PATCHREG_TORCHSORT=1 builds it)"
    else
        local kept="" folder
        while IFS= read -r -d : folder; do
            [ -x "$folder/nvcc" ] || kept="$kept:$folder"
        done <<<"$PATH:"
        if env -u CUDA_HOME -u CUDA_PATH PATH="${kept#:}" "$(command -v python)" -m pip install -q \
            -c tools/constraints.txt --no-build-isolation torchsort; then
            echo "torchsort: built for the CPU, with nvcc out of sight"
        else
            echo "torchsort: could not be built; the PyTorch path is used instead"
        fi
    fi
}
