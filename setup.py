"""Package list: setuptools' discovery does not follow ``package-dir``, so sub-packages are listed here."""

from setuptools import find_packages, setup

FOLDERS = ("apps", "diffusion", "pde", "core_optim", "checkpoints", "configs")


def packages(folder: str) -> list[str]:
    """A top-level folder and the packages below it, under their import names."""
    return [f"thalweg.{folder}", *(f"thalweg.{folder}.{sub}" for sub in find_packages(folder))]


setup(packages=[name for folder in FOLDERS for name in packages(folder)])
