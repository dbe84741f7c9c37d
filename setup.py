"""`ijepa_fast`, the trainer, and, from a clone, `ijepa_kernels` with it: `pip install .` needs no
index. What is uploaded has the kernels as a dependency, which other projects may have, too; their
wheel is made of `kernels/`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# an sdist has this file and a clone has not; `python -m build` makes the wheel of the sdist
UPLOADED = (ROOT / "PKG-INFO").exists()


def version(package: str) -> str:
    """Its `__version__`, without importing it."""
    text = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found


KERNELS = {"ijepa_kernels": "kernels/ijepa_kernels"}
PACKAGES = find_packages(include=["ijepa_fast", "ijepa_fast.*"])
REQUIRED = ["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "numpy>=1.26"]
if UPLOADED:
    REQUIRED.append(f"ijepa-kernels=={version(KERNELS['ijepa_kernels'])}")
else:
    PACKAGES += find_packages("kernels", include=["ijepa_kernels*"])

EXTRAS = {
    "train": [
        "tyro>=1.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.5",
        "pillow>=11.0",
        "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'",
    ],
    "gpu": ["xformers>=0.0.35"],
    "log": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.18"],
    "mlflow": ["mlflow-skinny>=2.20"],
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
    "hub": ["huggingface_hub>=0.26"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    "viz": ["matplotlib>=3.9"],
    "test": [
        "datasets>=3.0",
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "pytest>=8.3",
        "pytest-benchmark>=5.1",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "psutil>=6.0",
        "scikit-image>=0.25",
        "scikit-learn>=1.6",
        "setuptools>=77",
        "mypy>=1.14",
        "ruff>=0.9",
        "transformers>=5.0",
        "types-PyYAML",
        "zstandard>=0.23",
    ],
}
EXTRAS["all"] = [requirement for extra in EXTRAS.values() for requirement in extra]

setup(
    name="ijepa-fast",
    version=version("ijepa_fast"),
    description="Faithful and fast I-JEPA pretraining",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir=KERNELS,
    package_data={
        "ijepa_fast": ["py.typed", "data/sets/fashion_mnist_10k/*"],
        "ijepa_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["ijepa-fast = ijepa_fast.__main__:enter"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    keywords=["I-JEPA", "JEPA", "self-supervised learning", "ViT", "PyTorch", "Triton", "CUDA"],
    project_urls={"Paper": "https://arxiv.org/abs/2301.08243"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
