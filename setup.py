"""The code to compile, which `pyproject.toml` can name only experimentally. Without a compiler numpy does the same."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("registry.store._split", ["store/_split.c"], optional=True)])
