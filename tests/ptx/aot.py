"""Compile a Triton kernel for a GPU that is not there, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharded_adamax.kernels.cuda import BLOCK, OPTIONS

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "u32": 4}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: its assembly, and what the assembler says of the machine code."""

    ptx: str
    sass: str
    stack_bytes: int  # spilled registers live here
    local_bytes: int
    registers: int
    elements_per_thread: float

    def bytes_per_element(self) -> float:
        """Return what the code reads and writes of vectors, counted from its instructions. It has no loop."""
        assert not re.search(r"\bbra\b", self.ptx), "counting instructions is right only where none is run twice"
        return sum(num_bytes for _, num_bytes in self.accesses()) / self.elements_per_thread

    def accesses(self) -> list[tuple[str, int]]:
        """Return the accesses to global memory, as ("ld", bytes); not the one of a scalar."""
        found = []
        for kind, vector, width in re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.(\w+)", self.ptx):
            found.append((kind, int(vector or 1) * _BYTES[width]))
        return found

    def sass_accesses(self) -> list[str]:
        return re.findall(r"\b((?:LDG|STG|LDL|STL|ATOM|RED)[.\w]*)", self.sass)


@cache
def compiled(
    kernel: Any,
    arch: int,
    *,
    grad: str = "fp32",
    rounded: str | None = None,
    scales: bool = False,
    capturable: bool = False,
    is_multiple_of_16: bool = True,
    decays: bool = False,
    maximize: bool = False,
    near: bool = True,
    cuda_order: bool = True,
) -> Compiled:
    """Compile for compute capability ``arch`` (90 is an H100), as a launch with aligned tensors would."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    types = {
        "grad_ptr": f"*{grad}", "rounded_ptr": rounded and f"*{rounded}", "scale_ptr": "*fp32" if scales else None,
        "correction_ptr": "*fp32" if capturable else None,
    }  # fmt: skip
    flags: dict[str, Any] = {
        "decays": decays, "maximize": maximize, "near": near, "cuda_order": cuda_order, "block": BLOCK,
    }  # fmt: skip
    for index, name in enumerate(kernel.arg_names):
        type_ = types.get(name, "*fp32") if name.endswith("_ptr") else "i32" if name == "numel" else "fp32"
        if name in flags or type_ is None:
            signature[name], constants[(index,)] = "constexpr", flags.get(name)
            continue
        signature[name] = type_
        if name.endswith("_ptr") or (name == "numel" and is_multiple_of_16):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)
    usage, sass = _inspect(result.asm["cubin"])
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return Compiled(
        result.asm["ptx"], sass, int(numbers["STACK"]), int(numbers["LOCAL"]), int(numbers["REG"]),
        BLOCK / (32 * OPTIONS["num_warps"]),
    )  # fmt: skip


def _inspect(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ([_TOOLS / "cuobjdump", "-res-usage", path], [_TOOLS / "nvdisasm", "-c", path])
        outputs = [subprocess.run(command, capture_output=True, text=True, check=True) for command in commands]
    return outputs[0].stdout + outputs[0].stderr, outputs[1].stdout
