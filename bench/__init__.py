"""Measurements of fusedkd beside plain torch, run from the repository: `python -m bench.heads`."""
