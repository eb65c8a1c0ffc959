"""The Triton kernels, what they take, and their launchers."""
