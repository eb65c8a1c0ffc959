"""Compiling the kernels without a GPU: checks of the code, and the C library's sources."""
