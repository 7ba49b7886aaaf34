"""Builds `eaptk._native`, the one compiled module. Everything else about the package is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    # The folder kernels/ is imported as eaptk.kernels: a top-level package of that name
    # would shadow Hugging Face's `kernels`, which transformers imports.
    packages=["eaptk", "eaptk.kernels"],
    package_dir={"eaptk.kernels": "kernels"},
    package_data={"eaptk": ["py.typed", "*.pyi", "assets/*"]},
    ext_modules=[
        Pybind11Extension(
            "eaptk._native",
            sorted(str(source) for source in Path("csrc").glob("*.cpp")),
            depends=sorted(str(header) for header in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
