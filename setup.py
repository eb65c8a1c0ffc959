"""Package layout: the top-level folder kernels/ installs as fusedkd.kernels, python/fusedkd as fusedkd."""

from setuptools import setup

setup(
    package_dir={"": "python", "fusedkd.kernels": "kernels"},
    packages=["fusedkd", "fusedkd.kernels", "fusedkd.kernels.divergences"],
    package_data={"fusedkd": ["py.typed"]},
)
