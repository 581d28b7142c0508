"""Packaging. `models/`, `kernels/` and `configs/` belong to the package through links in megatron_refine/."""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

LINKS = ("models", "kernels", "configs")
PACKAGE = Path(__file__).parent / "megatron_refine"

# lm_eval's RULER tasks import transformers, which `ruler` does not ask for.
HARNESS = ["lm-eval[ruler]==0.4.13", "transformers"]
EXTRAS = {
    # Enough to train. Apex is optional and built from source: the package of that name on the index is something else.
    "gpu": ["flash-linear-attention==0.6.0"],
    # Transformer Engine brings the fused Adam; pip compiles it. Megatron-Core 0.16.1 takes 2.9 to 2.11.
    "te": ["transformer-engine[core_cu13,pytorch]==2.11.0"],
    # Servers run in a Python environment of their own: SGLang pins its own PyTorch.
    "sglang": ["sglang==0.5.23"],
    "eval": HARNESS,
    "wandb": ["wandb"],
    "docs": ["mkdocs-material"],  # the site; `make docs` installs it in an environment of its own
    # fuzzywuzzy: a test holds our likeness of code to it.
    "dev": [
        *HARNESS,
        "wandb",
        "fuzzywuzzy==0.18.0",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],  # fmt: skip
}

if missing := [name for name in LINKS if not (PACKAGE / name).is_dir()]:  # checked out or unpacked without links
    sys.exit(
        f"megatron_refine/{missing[0]}: must be a link to ../{missing[0]}, and is no folder. Make all links anew:\n"
        f"    (cd megatron_refine && ln -sfn {' '.join(f'../{name}' for name in LINKS)} .)"
    )


class SdistWithLinks(sdist):
    """An sdist is a checkout: it holds what the links lead to once, and the links."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then link, as git does."""
        linked = tuple(f"megatron_refine/{name}/" for name in LINKS)
        super().make_release_tree(base_dir, [file for file in files if not file.startswith(linked)])
        for name in LINKS:
            os.symlink(f"../{name}", f"{base_dir}/megatron_refine/{name}")


setup(
    name="megatron-refine",
    version=re.findall(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.M)[0],
    description="REFINE training of fast-weight language models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")],
    cmdclass={"sdist": SdistWithLinks},
    packages=find_packages(include=["megatron_refine", "megatron_refine.*"]),
    package_data={
        "megatron_refine": ["configs/**/*.yaml", "kernels/tuning/*.json"],
        "megatron_refine.slurm": ["job.sh"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        # the last release for Python 3.11, and what newer ones take (docs/compatibility.md)
        'megatron-core==0.16.1; python_version < "3.12"',
        'megatron-core>=0.19.2,<0.20; python_version >= "3.12"',
        # Megatron-Core 0.19 imports it, and does not say so
        'triton; python_version >= "3.12" and platform_system == "Linux"',
        "einops",
        "httpx",
        "matplotlib",
        "numpy",
        "packaging",
        "pyarrow",
        "psutil",  # without it a Megatron checkpoint save hangs
        "pydantic>=2",
        "pyyaml",
        "rouge==1.0.1",  # its ROUGE-L is LongBench's, and no other library's
        "safetensors",
        "sentencepiece>=0.2",
        "tokenizers",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-refine = megatron_refine.cli:main"],
        "sglang.srt.plugins": ["megatron_refine = megatron_refine.engine.plugin:register"],
    },
)
