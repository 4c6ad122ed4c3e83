"""Kept for tools that call it; everything it needs stands in pyproject.toml."""

from setuptools import setup

setup()
