"""The mathematics of the divergences: formulas that kernels and torch share. Nothing here touches memory."""
