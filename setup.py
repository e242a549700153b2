"""The package. Versions and their reasons are in aquila_pd/runtime/versions.py; they are only handed over here."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# run as a file, not imported: nothing needs to be installed to build the package
VERSIONS = runpy.run_path(str(ROOT / "aquila_pd" / "runtime" / "versions.py"))
README = ROOT / "README.md"

setup(
    name=VERSIONS["NAME"],
    version=VERSIONS["VERSION"],
    description="BAAI's Aquila2 language models on PaddlePaddle and PaddleNLP: conversion, loading, generation",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=VERSIONS["PYTHON"],
    packages=find_packages(include=["aquila_pd", "aquila_pd.*"]),
    package_data={"aquila_pd.serving": ["page.html"]},
    install_requires=VERSIONS["requirements"](),
    extras_require=VERSIONS["extras"](),
    entry_points={"console_scripts": ["aquila-pd = aquila_pd.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
