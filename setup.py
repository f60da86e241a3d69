"""Metadata and dependencies of patchreg; builds the compiled operators when this machine can.

PATCHREG_BUILD_OPS: unset = try and report; 0 = skip; 1 = fail the installation when nothing was
built. PATCHREG_BUILD_CUDA=0: leave out the CUDA kernels (they take a minute and a half).
TORCH_CUDA_ARCH_LIST: GPU architectures (default 8.0;9.0+PTX; no visible GPU is needed).
The build needs the torch of the target environment: `pip install --no-build-isolation .`
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MODE = os.environ.get("PATCHREG_BUILD_OPS", "")
FIX = "then run: pip install --no-build-isolation ."


def report(message):
    print(f"patchreg_ops: {message}", flush=True)


def give_up(reason, remedy=FIX):
    """Reports that no operators are built; an error when the user asked for them."""
    if MODE == "1":
        raise SystemExit(f"patchreg_ops: not built: {reason}; {remedy}")
    report(f"NOT built, the pure PyTorch operators will run: {reason}; {remedy}")


def toolkit_root():
    """Folder of the CUDA toolkit behind `nvcc` (which may be a wrapper elsewhere), or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None or shutil.which(nvcc) is None:
        return None
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def wheel_includes(torch):
    """Header folders of the `nvidia` wheels beside torch; partial toolkits lack some of them."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    return sorted(str(path) for path in packages.glob("*/include") if path.is_dir())


def extension_arguments():
    """ext_modules and cmdclass for setup(), empty when nothing can be built."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/csrc/*.cpp"))
    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/csrc/*.cu"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/csrc/*.*h"))
    if MODE == "0":
        report("not built: PATCHREG_BUILD_OPS=0")
        return {}
    if not sources:
        give_up("no sources in ops/csrc", "use a complete checkout")
        return {}
    try:
        import torch
    except Exception as error:
        give_up(f"torch does not import here ({error})", "install torch, " + FIX)
        return {}
    cuda = torch.version.cuda and os.environ.get("PATCHREG_BUILD_CUDA", "1") != "0"
    root = toolkit_root() if cuda else None
    if root is not None:
        os.environ["CUDA_HOME"] = str(root)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    from torch.utils import cpp_extension

    def extension(with_cuda):
        kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
        # No -std: the sources are C++17, torch adds the (newer) standard that its headers need.
        host = ["-O3", "-ffp-contract=off", "-fopenmp"]
        flags = {"cxx": host, "nvcc": ["-O3"]} if with_cuda else host
        return kind(
            "patchreg_ops._C",
            sources + (kernels if with_cuda else []),
            include_dirs=wheel_includes(torch) if with_cuda else [],
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
            depends=headers,
        )

    class BuildOps(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
        """Builds CPU and CUDA kernels, else the CPU kernels alone, else nothing."""

        def run(self):
            attempts = [True, False] if root is not None and kernels else [False]
            reason = ""
            wanted = self.compiler, self.inplace
            for with_cuda in attempts:
                self.compiler, self.inplace = wanted  # A failed attempt leaves its own behind.
                parts = "CPU and CUDA" if with_cuda else "CPU"
                # In place: the object carries what finalize_options() noted on it.
                vars(self.extensions[0]).update(vars(extension(with_cuda)))
                try:
                    super().run()
                except (Exception, SystemExit) as error:
                    reason = f"the {parts} build failed: {error}"
                    report(reason)
                    continue
                arch = f" for {os.environ['TORCH_CUDA_ARCH_LIST']}" if with_cuda else ""
                report(f"built {parts} kernels{arch} with torch {torch.__version__}")
                return
            give_up(reason, "install the compiler torch needs, " + FIX)

        def build_extensions(self):
            plain = self.compiler.object_filenames

            def distinct(sources, *args, **kwargs):
                """One stem, two languages: region_sample.cu must not overwrite region_sample.o."""
                objects = plain(sources, *args, **kwargs)
                return [
                    str(Path(path).with_suffix(".cuda.o")) if str(source).endswith(".cu") else path
                    for source, path in zip(sources, objects)
                ]

            self.compiler.object_filenames = distinct
            super().build_extensions()

    return {"ext_modules": [extension(False)], "cmdclass": {"build_ext": BuildOps}}


readme = ROOT / "README.md"
setup(
    name="patchreg",
    version="0.1.0",
    description="Plug-in training engine for methods that look at an image patch by patch",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["patchreg", "patchreg.*"]),
        "patchreg.configs",
        "patchreg_ops",
    ],
    # Configs go along, so that patchreg.load("dge/quick") works without a checkout.
    package_dir={"patchreg": "patchreg", "patchreg.configs": "configs", "patchreg_ops": "ops"},
    package_data={
        "patchreg": ["**/*.json", "**/*.npz", "**/*.txt"],
        "patchreg.configs": ["**/*.py", "**/*.yml", "**/*.pth", "**/*.safetensors"],
        "patchreg_ops": ["csrc/*", "README.md"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "mmengine>=0.10.7",
        "mmcv-lite>=2.1",
        "mmpretrain>=1.2.0",
        "timm>=1.0",
        "numpy>=1.24",
        "pillow",
        "matplotlib",
        "packaging",
        "safetensors",
        "rich",
    ],
    extras_require={
        "torchsort": ["torchsort"],
        "faiss-cpu": ["faiss-cpu"],
        "faiss-gpu": ["faiss-gpu"],
        "tensorboard": ["tensorboard"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "hypothesis",
            "tensorboard",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "scikit-learn",
            "scipy",
        ],
    },
    zip_safe=False,
    **extension_arguments(),
)
