"""Package layout: kernels/ installs as fusedkd.kernels, bench/ as fusedkd.bench, python/fusedkd as fusedkd."""

from setuptools import setup

setup(
    package_dir={"": "python", "fusedkd.kernels": "kernels", "fusedkd.bench": "bench"},
    packages=["fusedkd", "fusedkd.bench", "fusedkd.compat", "fusedkd.kernels", "fusedkd.kernels.divergences"],
    package_data={"fusedkd": ["py.typed"], "fusedkd.kernels": ["c/*"]},
)
