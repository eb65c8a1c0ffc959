"""Triton kernels and the mathematics they share with the CPU path. Imports triton and torch only."""
