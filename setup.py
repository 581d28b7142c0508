"""Packaging. `models/`, `kernels/` and `configs/` belong to the package through links in megatron_refine/."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

# lm_eval's RULER tasks import transformers, which `ruler` does not ask for.
HARNESS = ["lm-eval[ruler]==0.4.13", "transformers"]
EXTRAS = {
    # Transformer Engine brings the fused Adam. Apex is optional and built from source: the package of that name on the
    # index is something else.
    "gpu": ["transformer-engine[pytorch]", "flash-linear-attention"],
    # Servers run in a Python environment of their own: SGLang pins its own PyTorch.
    "sglang": ["sglang==0.5.23"],
    "eval": HARNESS,
    "docs": ["mkdocs-material"],  # the site; `make docs` installs it in an environment of its own
    # fuzzywuzzy: a test holds our likeness of code to it.
    "dev": [*HARNESS, "fuzzywuzzy==0.18.0", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "types-PyYAML"],
}

for name in ("models", "kernels", "configs"):
    if not (Path(__file__).parent / "megatron_refine" / name).is_dir():  # checked out or unpacked without links
        sys.exit(f"megatron_refine/{name}: is no folder; it must be a link to ../{name}")

setup(
    name="megatron-refine",
    version="0.1.0",
    description="REFINE training of fast-weight language models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_refine", "megatron_refine.*"]),
    package_data={"megatron_refine": ["configs/**/*.yaml"], "megatron_refine.slurm": ["job.sh"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "megatron-core==0.16.1",
        "datasets",
        "einops",
        "httpx",
        "matplotlib",
        "numpy",
        "packaging",
        "psutil",  # without it a Megatron checkpoint save hangs
        "pydantic>=2",
        "pyyaml",
        "rouge==1.0.1",  # its ROUGE-L is LongBench's, and no other library's
        "safetensors",
        "sentencepiece>=0.2",
        "tokenizers",
        "tqdm",
        "wandb",
    ],
    extras_require=EXTRAS,
    entry_points={"sglang.srt.plugins": ["megatron_refine = megatron_refine.engine.plugin:register"]},
)
