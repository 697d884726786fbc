"""Package list: setuptools' discovery does not follow ``package-dir``, so the sub-packages are listed here."""

from setuptools import find_packages, setup

FOLDERS = ("apps", "diffusion", "pde", "core_optim", "checkpoints", "configs")

setup(
    packages=[
        f"thalweg.{name}"
        for top in FOLDERS
        for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))
    ]
)
