"""What the shared library holds is what its manifest says: python manifest.py LIBRARY MANIFEST ARCH ..."""

import ctypes
import json
import struct
import sys
from pathlib import Path

library = ctypes.CDLL(sys.argv[1])
manifest = json.loads(Path(sys.argv[2]).read_text())
kernels = manifest["kernels"]
assert kernels, "no kernels"
assert {kernel["arch"] for kernel in kernels} == {int(arch) for arch in sys.argv[3:]}, (
    "other architectures than asked for"
)
for kernel in kernels:
    name = kernel["symbol"]
    code = bytes((ctypes.c_ubyte * kernel["bytes"]).in_dll(library, name))  # ValueError: the symbol is not exported
    assert code[:4] == b"\x7fELF", f"{name} is no ELF file"
    (flags,) = struct.unpack_from("<I", code, 48)
    arch = flags >> 8 & 0xFF if code[7] == 0x41 else flags & 0xFF  # the second ABI moved it
    assert arch == kernel["arch"], f"{name} holds code for sm_{arch}"
    assert kernel["spills"] == 0, f"{name} spills {kernel['spills']} bytes"
    assert kernel["entry"].encode() in code, f"{name} has no {kernel['entry']}"
    assert kernel["registers"] * 32 * kernel["num_warps"] <= 65_536, f"{name} cannot be launched"
KEY = ("divergence", "dtype", "arch", "kernel", "variant")
each = {tuple(kernel[key] for key in KEY) for kernel in kernels}
assert len(each) == len(kernels), "a kernel stands twice in the manifest"
for kernel in kernels:
    for further in (("variant", ("aligned", "generic")), ("kernel", ("value", "value_and_gradient"))):
        for value in further[1]:
            other = {**kernel, further[0]: value}
            assert tuple(other[k] for k in ("divergence", "dtype", "arch", "kernel", "variant")) in each, other[
                "symbol"
            ]
print(f"{len(kernels)} kernels, {sum(k['bytes'] for k in kernels) >> 20} MiB")
