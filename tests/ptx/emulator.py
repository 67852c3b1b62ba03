"""Execute compiled PTX on the CPU: all threads of all programs at once, instruction by instruction.

What it shows: the arithmetic that the compiler chose (which products and sums became one), the addresses, the masks,
and how often each byte is read and written. What it cannot show: races (the threads go in lock step, so a missing
barrier would not be noticed), time, and anything that the assembler or a real GPU does differently from the manual.
It knows straight code only and raises on any instruction that it does not know: an approximate division, say.

Source: NVIDIA, Parallel Thread Execution ISA.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there: where it is inexact its last bit becomes 1, so
    that rounding it once more to float32 gives what rounding the exact sum would have given.
    """
    with np.errstate(all="ignore"):
        product, addend = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = np.ascontiguousarray(total).view(np.int64)
        to_odd = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
        bits = bits + np.where(to_odd, np.where((error > 0) == (total > 0), 1, -1), 0)
        return np.asarray(bits.view(np.float64).astype(np.float32))


def to_bf16(x: Array) -> Array:
    """Return the bits of x rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16)) % 2) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


class Buffer:
    """One tensor in the emulated memory, and how often each of its bytes was read and written."""

    def __init__(self, array: Array, address: int) -> None:
        self.data = array.reshape(-1).view(np.uint8)
        self.address = address
        self.reads = np.zeros(self.data.size, np.int64)
        self.writes = np.zeros(self.data.size, np.int64)


class Memory:
    """Disjoint buffers, far from each other: an access outside of all of them, or over an end, is an error."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, array: Array) -> Buffer:
        """Place ``array``, which is modified in place; at an address that is a multiple of 2**40."""
        self.buffers.append(Buffer(array, (len(self.buffers) + 1) << 40))
        return self.buffers[-1]

    def at(self, addresses: Array, num_bytes: int) -> tuple[Buffer, Array]:
        """Return the buffer that all ``addresses`` are in, and for each the indices of its bytes."""
        if (addresses % np.uint64(num_bytes)).any():
            raise ValueError(f"expected addresses that are multiples of {num_bytes}, got {addresses[:4]}")
        for buffer in self.buffers:
            starts = addresses.astype(np.int64) - buffer.address
            inside = (starts >= 0) & (starts + num_bytes <= buffer.data.size)
            if inside.all():
                return buffer, starts[:, None] + np.arange(num_bytes)
        raise IndexError(f"expected addresses in one buffer, got {addresses.min():#x} to {addresses.max():#x}")


class Instruction(NamedTuple):
    """``@!%p1 ld.global.v4.b32 {%r1, ...}, [%rd1+16]`` in its parts."""

    predicate: str | None
    negated: bool
    name: str
    operands: list[str]


_TYPES = {
    "f32": np.float32, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "b16": np.uint16, "bf16": np.uint16, "f16": np.float16,
}  # fmt: skip
_RULES: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma32, "max": np.maximum,
    "abs": np.abs, "neg": np.negative, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
# With .rn arithmetic on floats is rounded to nearest even and never contracted with its neighbours. Others are unknown.
_ARITHMETIC = re.compile(
    r"(add|sub|mul|fma|div)\.rn\.f32|max\.NaN\.f32|(abs|neg)\.f32|(add|sub|neg)\.[su](32|64)|(and|or|xor|shl)\.b(32|64)"
    r"|shr\.[su](32|64)"
)


class Program:
    """A kernel, parsed."""

    def __init__(self, ptx: str) -> None:
        self.num_threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
        self.params = re.findall(r"\.param [^,\n]*?(\w+_param_\d+)", ptx)
        self.instructions: list[Instruction] = []
        for line in ptx[ptx.index("{\n") :].splitlines():
            match = re.match(r"\s*(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);", re.sub(r"//.*", "", line))
            if match is None:
                continue  # a directive, a label, a comment, a brace
            negated, predicate, name, operands = match.groups()
            parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
            self.instructions.append(Instruction(predicate, negated == "!", name, parts))

    def run(self, num_programs: int, memory: Memory, arguments: list[int | float], shared_bytes: int = 16384) -> None:
        """Execute all programs of a one-dimensional grid.

        Args:
            arguments: In the order of the kernel's; a pointer is the address of a buffer.
        """
        state = _State(self, num_programs, memory, arguments, shared_bytes)
        with np.errstate(all="ignore"):
            for instruction in self.instructions:
                if instruction.name == "ret":
                    return
                state.execute(instruction)


class _State:
    """The registers of all threads, as bits."""

    def __init__(
        self, program: Program, num_programs: int, memory: Memory, arguments: list[int | float], shared_bytes: int
    ) -> None:
        self.memory = memory
        self.numel = num_programs * program.num_threads
        # Triton appends pointers to scratch memory, which these kernels do not use: an address of nothing.
        self.arguments = dict(zip(program.params, [*arguments, 0, 0], strict=True))
        thread = np.arange(self.numel, dtype=np.uint32)
        self.block = thread // program.num_threads
        self.shared = np.zeros((num_programs, shared_bytes), np.uint8)
        zeros = np.zeros(self.numel, np.uint32)
        self.registers: dict[str, Array] = {
            "%tid.x": thread % program.num_threads, "%ctaid.x": self.block, "global_smem": zeros,
        }  # fmt: skip

    def read(self, operand: str, type_: str) -> Array:
        dtype = _TYPES[type_]
        if operand.startswith("0f"):
            return np.full(self.numel, int(operand[2:], 16), np.uint32).view(dtype)
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            return np.full(self.numel, int(operand, 0), np.int64).astype(dtype)
        bits = self.registers[operand]
        assert bits.dtype.itemsize == np.dtype(dtype).itemsize, f"{operand} of {bits.dtype} read as {type_}"
        return bits.view(dtype)

    def write(self, register: str, value: Array, mask: Array | None = None) -> None:
        value = np.ascontiguousarray(value)
        if value.dtype != np.bool_:
            value = value.view(f"u{value.dtype.itemsize}")
        self.registers[register] = value if mask is None else np.where(mask, value, self.registers[register])

    def execute(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        mask = None
        if instruction.predicate is not None:
            mask = self.registers[instruction.predicate] ^ instruction.negated
        kind, type_ = name.split(".")[0], name.split(".")[-1]
        if name.startswith(("ld.global", "st.global", "ld.shared", "st.shared")):
            self._access(name, operands, np.ones(self.numel, bool) if mask is None else mask)
        elif mask is not None:
            raise NotImplementedError(f"a predicate on {name}")
        elif kind == "bar":
            pass  # in lock step
        elif name.startswith("ld.param"):
            self._load_argument(operands)
        elif name in ("mov.b32", "mov.u32", "mov.b64"):
            self._move(operands, type_)
        elif name == "mul.wide.u32":
            self.write(operands[0], self.read(operands[1], "u32").astype(np.uint64) * self.read(operands[2], "u32"))
        elif name == "setp.lt.s64":
            self.write(operands[0], self.read(operands[1], "s64") < self.read(operands[2], "s64"))
        elif name.startswith("cvt."):
            self._convert(name, operands)
        elif _ARITHMETIC.fullmatch(name):
            self.write(operands[0], _RULES[kind](*(self.read(operand, type_) for operand in operands[1:])))
        else:
            raise NotImplementedError(f"instruction {name} {', '.join(operands)}")

    def _load_argument(self, operands: list[str]) -> None:
        value = self.arguments[operands[1].strip("[ ]")]
        if isinstance(value, float):
            self.write(operands[0], np.full(self.numel, value, np.float32))
        else:
            self.write(operands[0], np.full(self.numel, value, np.int64 if "%rd" in operands[0] else np.int32))

    def _move(self, operands: list[str], type_: str) -> None:
        target, source = operands
        if source.startswith("{"):
            low, high = (self.read(part, "b16").astype(np.uint32) for part in source.strip("{}").split(", "))
            self.write(target, low | high << np.uint32(16))
        elif target.startswith("{"):
            for part, shift in zip(target.strip("{}").split(", "), (0, 16), strict=True):
                self.write(part, (self.read(source, "b32") >> np.uint32(shift)).astype(np.uint16))
        else:
            self.write(target, self.read(source, type_))

    def _convert(self, name: str, operands: list[str]) -> None:
        target, *sources = operands
        if name in ("cvt.u64.u32", "cvt.s64.s32"):
            self.write(target, self.read(sources[0], name[-3:]).astype(_TYPES[name.split(".")[1]]))
        elif name == "cvt.f32.bf16":
            self.write(target, self.read(sources[0], "bf16").astype(np.uint32) << np.uint32(16))
        elif name == "cvt.f32.f16":
            self.write(target, self.read(sources[0], "f16").astype(np.float32))
        elif name in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
            values = [self.read(source, "f32") for source in sources]
            if "bf16" in name:
                high, low = (to_bf16(value) for value in values)
            else:
                high, low = (value.astype(np.float16).view(np.uint16) for value in values)
            self.write(target, low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16))
        else:
            raise NotImplementedError(f"instruction {name} {', '.join(operands)}")

    def _access(self, name: str, operands: list[str], mask: Array) -> None:
        loads = name.startswith("ld")
        address, values = (operands[1], operands[0]) if loads else (operands[0], operands[1])
        registers = [part.strip() for part in values.strip("{}").split(",")]
        type_ = name.split(".")[-1]
        width = int(type_[1:]) // 8
        num_bytes = width * len(registers)
        base, offset = re.findall(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", address)[0]
        in_shared = ".shared" in name
        addresses = self.read(base, "u32" if in_shared else "u64").astype(np.uint64) + np.uint64(offset or 0)
        if not mask.any():
            data, where = self.shared[:1], (np.zeros((0, 1), np.int64), np.zeros((0, num_bytes), np.int64))
        elif in_shared:
            data, where = self.shared, (
                self.block[mask][:, None], addresses[mask].astype(np.int64)[:, None] + np.arange(num_bytes)
            )  # fmt: skip
        else:
            buffer, indices = self.memory.at(addresses[mask], num_bytes)
            np.add.at(buffer.reads if loads else buffer.writes, indices.ravel(), 1)
            data, where = buffer.data[None], (np.zeros((1, 1), np.int64), indices)
        if loads:
            found = np.zeros((self.numel, num_bytes), np.uint8)
            found[mask] = data[where]
            for index, register in enumerate(registers):
                column = np.ascontiguousarray(found[:, index * width : (index + 1) * width])
                self.write(register, column.view(_TYPES[type_])[:, 0], mask if register in self.registers else None)
        else:
            columns = [self.read(register, type_)[:, None].view(np.uint8) for register in registers]
            data[where] = np.concatenate(columns, axis=1)[mask]
