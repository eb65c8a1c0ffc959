"""The commands of `python -m fusedkd`."""
