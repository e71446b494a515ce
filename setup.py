"""Packaging. `engine/` installs as prfl_engine and `kernels/` as prfl_kernels.

`kernels/` has no __init__.py on purpose: with one, anything started in the repository's root would
import that folder when it asks for Hugging Face's `kernels` package. A plain namespace folder on
sys.path gives way to an installed package of the same name.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "engine/__init__.py").read_text())[1]
TRITON = "triton; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'"

setup(
    name="prfl",
    version=VERSION,
    description="Process reward feedback learning for video diffusion transformers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["prfl_engine", "prfl_kernels"],
    package_dir={"prfl_engine": "engine", "prfl_kernels": "kernels"},
    install_requires=[
        "torch>=2.9",
        TRITON,
        "safetensors",
        "numpy",
        "PyYAML",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "pillow",
        "av",
    ],
    extras_require={
        # xformers asks for torch >= 2.10. FlashAttention 2 (flash-attn) has no wheel and compiles
        # for an hour, FlashAttention 3 is not on PyPI at all, and NVIDIA's apex is not the package
        # of that name there: none of the three is forced, `prfl doctor` says how to get each.
        "gpu": ["nvidia-ml-py", "xformers"],
        "fa4": ["flash-attn-4>=4.0.0b1"],  # prereleases only, so the bound has to name one
        "wan": ["diffusers", "transformers"],
        "lora": ["peft"],
        "dev": ["pytest", "pytest-xdist", "ruff", "hypothesis", "ninja", "pybind11"],
    },
    entry_points={"console_scripts": ["prfl = prfl_engine.cli:main"]},
)
