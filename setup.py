"""Packaging. `criterions/` stays at the top of the repository and installs as `fairseq_sparsemixer.criterions`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
URL = "https://github.com/fairseq-sparsemixer/fairseq-sparsemixer"

# fairseq 0.12.2 does not import on Python 3.11 or later; fairseq-fixed is the same import package, kept working. An extra:
# several distributions provide that package, and pip must not lay one over the one that is there (docs/support.md).
FAIRSEQ = [
    "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
    "fairseq==0.12.2; python_version < '3.11'",
]
# what plot, study, glue and completion need beyond training
TOOLS = ["matplotlib>=3.7", "sacrebleu>=2.3", "sentencepiece>=0.1.99", "shtab>=1.6", "tabulate>=0.9"]
HF = ["safetensors>=0.4"]  # what export-hf needs


def absolute(link: "re.Match") -> str:
    """A link of the README to a file of the repository, as it works on a package page."""
    path = link.group(1)
    return f"]({URL}/{'raw' if path.endswith(('.png', '.svg')) else 'blob'}/main/{path})"


setup(
    name="fairseq-sparsemixer",
    version="0.1.0",
    description="Mixture-of-Experts training in fairseq with SparseMixer and the routers it is compared with",
    long_description=re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", absolute, (HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="fairseq-sparsemixer developers",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="mixture-of-experts moe fairseq sparsemixer transformer pytorch",
    python_requires=">=3.9,<3.14",
    packages=find_packages(include=["fairseq_sparsemixer", "fairseq_sparsemixer.*"]) + ["fairseq_sparsemixer.criterions"],
    package_dir={"fairseq_sparsemixer.criterions": "criterions"},
    package_data={"fairseq_sparsemixer": ["py.typed"]},
    install_requires=[
        "torch>=2.4,<3",  # 2.4 has autocast by device type
        "fairscale==0.4.13",
        *("numpy", "omegaconf", "PyYAML>=5.1", "rich>=13"),
    ],
    extras_require={
        "fairseq": FAIRSEQ,
        "hf": HF,
        "tools": TOOLS,
        "test": [
            *TOOLS,
            *HF,
            "transformers>=4.45,<5",  # compared with export-hf; see docs/checkpoints.md for 5
            *("pytest>=7", "pytest-xdist>=3", "hypothesis>=6", "scipy>=1.10", "tensorboardX>=2.6"),
            *("Babel>=2.13", "sacremoses>=0.0.53"),  # of recipes/requirements.txt
            "triton>=3.0; sys_platform == 'linux' and platform_machine == 'x86_64'",  # CPU builds of torch come without
        ],
        "dev": ["codespell>=2.4", "mypy>=1.18", "pre-commit>=4", "ruff>=0.17.6,<0.18", "types-PyYAML", "types-tabulate"],
    },
    entry_points={"console_scripts": ["fairseq-sparsemixer=fairseq_sparsemixer.cli:main"]},
)
