"""Large pages for the large buffers of a CPU.

Linux hands out new memory in pages of 4 KiB and clears each when it is first written, which for the buffers of a call
takes about a tenth as long as its matrix products. Pages of 2 MiB take less, and have to be asked for.
"""

import ctypes
import mmap
import sys

import torch

LEAST = 1 << 25  # bytes: from here on memory comes fresh from the system, and goes back to it, whatever malloc learns
_advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _advise is not None:
    _advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def large(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous and not yet written, with large pages behind it where the system gives them; else as it is."""
    if _advise is not None and x.is_cpu and x.nbytes >= LEAST:
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # A kernel without large pages refuses the advice, which changes nothing but time.
        _advise(first, (x.data_ptr() + x.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return x
