"""Packaging. `criterions/` stays at the top of the repository and installs as `fairseq_sparsemixer.criterions`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# fairseq 0.12.2 does not import on Python 3.11 or later; fairseq-fixed is the same import package, kept working.
FAIRSEQ = [
    "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
    "fairseq==0.12.2; python_version < '3.11'",
]

setup(
    name="fairseq-sparsemixer",
    version="0.1.0",
    description="Mixture-of-Experts training in fairseq with SparseMixer and the routers it is compared with",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.8",
    packages=find_packages(include=["fairseq_sparsemixer", "fairseq_sparsemixer.*"]) + ["fairseq_sparsemixer.criterions"],
    package_dir={"fairseq_sparsemixer.criterions": "criterions"},
    install_requires=[
        "torch>=2.4,<3",  # 2.4 has autocast by device type; the last for Python 3.8
        *FAIRSEQ,
        "fairscale==0.4.13",
        "sacrebleu>=2.3",
        "sentencepiece>=0.1.99",
        "matplotlib>=3.7",
        "rich>=13",
        "shtab>=1.6",
    ],
    extras_require={
        "test": [
            *("pytest>=7", "pytest-xdist>=3", "hypothesis>=6", "Babel>=2.13", "scipy>=1.10", "tensorboardX>=2.6"),
            "sacremoses>=0.0.53",
        ],
        "quickstart": ["Babel>=2.13"],
        "recipes": ["Babel>=2.13", "sacremoses>=0.0.53"],
    },
    entry_points={"console_scripts": ["fairseq-sparsemixer=fairseq_sparsemixer.cli:main"]},
)
