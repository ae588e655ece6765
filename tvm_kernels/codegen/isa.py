"""Instruction sets: what a kernel generator needs to know about each, one class per set. Subclass to add one.

A kernel is written once, for vectors of `width` bytes; an instruction set says how sixteen-entry tables are looked up
and how 8-bit products are summed in fours. Names are those of `PMPD_MAX_ISA` and end the kernels' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tvm import tirx

from pmpd.tvm_kernels.codegen.emit import Emitter, lanes_of, shuffle, vector

__all__ = [
    "ISAS",
    "Avx2",
    "Avx512",
    "Avx512Vbmi",
    "Avx512Vnni",
    "AvxVnni",
    "Dotprod",
    "Isa",
    "Neon",
    "Portable",
    "isa_named",
]


# Bits of float32 numbers: the least that rounds to infinity in float16, and infinity itself. NaN is above both.
_BITS_65520, _BITS_INFINITY = 0x477FF000, 0x7F800000


def _bits(value: Any, dtype: str) -> Any:
    """Reinterpret the bits of a vector as one of another element type."""
    return value if str(value.ty.dtype) == dtype else tirx.reinterpret(dtype, value)


def _spread(value: Any, lanes: int) -> Any:
    """Repeat a vector until it has `lanes` lanes."""
    have = lanes_of(value)
    return shuffle([value], [lane % have for lane in range(lanes)]) if have < lanes else value


class Isa:
    """One instruction set.

    Attributes:
        name: as in `PMPD_MAX_ISA`.
        arch: the machines that have it: ``x86_64`` or ``aarch64``.
        needs: the instruction sets of ``ort_ops/isa.def`` that the processor must have, itself among them.
        integers_only: it adds nothing to the float arithmetic of the set it extends: kernels without 8-bit products,
            like attention's, are not made for it.
        width: bytes of a vector register.
        registers: how many vector registers there are.
        cpu, attributes: LLVM's names for it.
        levels: how many values an 8-bit code may take. 128 where the sum of two products must fit 16 bits.
        signed: the 8-bit product multiplies signed by signed, not unsigned by signed.
    """

    name: ClassVar[str]
    arch: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    width: ClassVar[int]
    registers: ClassVar[int]
    cpu: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[int] = 256
    signed: ClassVar[bool] = False
    integers_only: ClassVar[bool] = False

    @property
    def words(self) -> int:
        """How many 32-bit lanes a vector has."""
        return self.width // 4

    def select(self, mask: int, a: Any, b: Any) -> Any:
        """Take the bits of `a` where the 32-bit mask has ones and those of `b` elsewhere (uint32 lanes)."""
        return b ^ ((a ^ b) & tirx.const(mask, vector("uint32", self.words)))

    def tables(self, e: Emitter, buffer: Any, offset: int, bits: int) -> list[Any]:
        """Load the table of one row, ``max(16, 2**bits)`` bytes, in the form that `lookup` wants."""
        raise NotImplementedError

    def lookup(self, e: Emitter, tables: Sequence[Any], index: Any, bits: int) -> Any:
        """Return the table entry of every byte of `index` (uint32 lanes), as uint8 lanes.

        For up to 4 bits the index is the low nibble of a byte, with anything above it; otherwise the whole byte.
        """
        raise NotImplementedError

    def dot(self, total: Any, codes: Any, x: Any) -> Any:
        """Add to each int32 lane of `total` the products of its four bytes of codes and of x (int8)."""
        raise NotImplementedError

    def from_half(self, half: Any) -> Any:
        """Return uint16 lanes that hold float16 as float32 lanes."""
        lanes = lanes_of(half)
        return tirx.Cast(vector("float32", lanes), tirx.reinterpret(vector("float16", lanes), half))

    def to_half(self, x: Any) -> Any:
        """Return float32 lanes as float16 in uint16 lanes, rounded to nearest."""
        lanes = lanes_of(x)
        return tirx.reinterpret(vector("uint16", lanes), tirx.Cast(vector("float16", lanes), x))


class Portable(Isa):
    """No particular instruction set: for arithmetic that any compiler vectorizes. Only attention has such kernels."""

    name = "portable"
    needs: ClassVar[tuple[str, ...]] = ()
    width, registers, cpu = 16, 16, "generic"

    def from_half(self, half: Any) -> Any:
        """Shift exponent and mantissa to where float32 has them; one multiplication corrects the exponent bias.

        That holds for subnormal numbers too; infinity and NaN are given float32's greatest exponent.
        """
        lanes = lanes_of(half)
        words, floats = vector("uint32", lanes), vector("float32", lanes)
        wide = tirx.Cast(words, half)
        shifted = (wide & tirx.const(0x7FFF, words)) << tirx.const(13, words)
        scaled = tirx.reinterpret(words, tirx.reinterpret(floats, shifted) * tirx.const(2.0**112, floats))
        infinite = tirx.Select(
            shifted < tirx.const(0x7C00 << 13, words), tirx.const(0, words), tirx.const(0x7F800000, words)
        )
        sign = (wide & tirx.const(0x8000, words)) << tirx.const(16, words)
        return tirx.reinterpret(floats, scaled | infinite | sign)

    def to_half(self, x: Any) -> Any:
        """The same way back: the bits that are cut off round to even; from 65520 on the result is infinity."""
        lanes = lanes_of(x)
        words, floats = vector("uint32", lanes), vector("float32", lanes)
        bits = tirx.reinterpret(words, x)
        unsigned = bits & tirx.const(0x7FFFFFFF, words)
        scaled = tirx.reinterpret(words, tirx.reinterpret(floats, unsigned) * tirx.const(2.0**-112, floats))
        odd = (scaled >> tirx.const(13, words)) & tirx.const(1, words)
        rounded = (scaled + tirx.const(0xFFF, words) + odd) >> tirx.const(13, words)
        # Of unsigned integers, as which finite numbers, infinity and NaN come in this order.
        finite = tirx.Select(unsigned < tirx.const(_BITS_65520, words), rounded, tirx.const(0x7C00, words))
        magnitude = tirx.Select(unsigned <= tirx.const(_BITS_INFINITY, words), finite, tirx.const(0x7E00, words))
        sign = (bits >> tirx.const(16, words)) & tirx.const(0x8000, words)
        return tirx.Cast(vector("uint16", lanes), magnitude | sign)


class Avx2(Isa):
    """256-bit x86, as of 2013: byte shuffles, multiply-add of byte pairs into 16 bits."""

    name, arch = "avx2", "x86_64"
    needs: ClassVar[tuple[str, ...]] = ("avx2",)
    width, registers, cpu = 32, 16, "x86-64-v3"
    levels = 128
    shuffle = "llvm.x86.avx2.pshuf.b"
    pairs, quads = "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"
    saturating_add = "llvm.uadd.sat"

    def tables(self, e: Emitter, buffer: Any, offset: int, bits: int) -> list[Any]:
        """One vector for each sixteen entries, repeated in every 128-bit lane."""
        return [
            e.bind(_spread(e.load(buffer, offset + 16 * part, 16), self.width), "table")
            for part in range(max(1, 2**bits // 16))
        ]

    def lookup(self, e: Emitter, tables: Sequence[Any], index: Any, bits: int) -> Any:
        """Shuffles; of several tables, all but the right one give zero, because a byte above 127 shuffles to zero."""
        bytes_, words = vector("uint8", self.width), vector("uint32", self.words)

        def shuffled(table: Any, where: Any) -> Any:
            return tirx.call_llvm_pure_intrin(bytes_, self.shuffle, table, _bits(where, bytes_))

        if len(tables) == 1:
            return e.bind(shuffled(tables[0], index & tirx.const(0x0F0F0F0F, words)))
        values: Any = None
        for part, table in enumerate(tables):
            distance = _bits(index ^ tirx.const(part * 0x10101010, words), bytes_)
            where = tirx.call_llvm_pure_intrin(bytes_, self.saturating_add, distance, tirx.const(0x70, bytes_))
            entries = _bits(shuffled(table, where), words)
            values = entries if values is None else values | entries
        return e.bind(_bits(values, bytes_))

    def dot(self, total: Any, codes: Any, x: Any) -> Any:
        """Pairs in 16 bits, which 7-bit codes cannot overflow, then fours in 32."""
        halves = vector("int16", self.width // 2)
        pairs = tirx.call_llvm_pure_intrin(halves, self.pairs, codes, x)
        words = vector("int32", self.words)
        return total + tirx.call_llvm_pure_intrin(words, self.quads, pairs, tirx.const(1, halves))


class AvxVnni(Avx2):
    """AVX2 with the VNNI products in the VEX encoding (2021)."""

    name = "avxvnni"
    integers_only = True
    needs: ClassVar[tuple[str, ...]] = ("avx2", "avxvnni")
    attributes: ClassVar[tuple[str, ...]] = ("+avxvnni",)
    levels = 256
    product = "llvm.x86.avx512.vpdpbusd.256"

    def dot(self, total: Any, codes: Any, x: Any) -> Any:
        """One instruction."""
        return tirx.call_llvm_pure_intrin(vector("int32", self.words), self.product, total, codes, x)


class Avx512(Avx2):
    """512-bit x86, as of 2017 (F, BW, DQ, VL)."""

    name = "avx512"
    needs: ClassVar[tuple[str, ...]] = ("avx512",)
    width, registers, cpu = 64, 32, "x86-64-v4"
    shuffle = "llvm.x86.avx512.pshuf.b.512"
    pairs, quads = "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"

    def select(self, mask: int, a: Any, b: Any) -> Any:
        """One instruction: any function of three operands, here "if the first then the second else the third"."""
        words = vector("uint32", self.words)
        choose = tirx.const(0xCA, "int32")
        return tirx.call_llvm_pure_intrin(
            words, "llvm.x86.avx512.pternlog.d.512", tirx.const(mask, words), a, b, choose
        )


class Avx512Vnni(Avx512):
    """AVX-512 with the VNNI products (2019)."""

    name = "avx512vnni"
    integers_only = True
    needs: ClassVar[tuple[str, ...]] = ("avx512", "avx512vnni")
    attributes: ClassVar[tuple[str, ...]] = ("+avx512vnni",)
    levels = 256
    product = "llvm.x86.avx512.vpdpbusd.512"
    dot = AvxVnni.dot


class Avx512Vbmi(Avx512Vnni):
    """AVX-512 with VNNI and the byte permutations of VBMI (2019): tables of 64 entries, higher bits ignored."""

    name = "avx512vbmi"
    integers_only = True
    needs: ClassVar[tuple[str, ...]] = ("avx512", "avx512vnni", "avx512vbmi")
    attributes: ClassVar[tuple[str, ...]] = ("+avx512vnni", "+avx512vbmi")

    def tables(self, e: Emitter, buffer: Any, offset: int, bits: int) -> list[Any]:
        """One vector for each 64 entries; a smaller table is repeated."""
        size = max(16, 2**bits)
        return [
            e.bind(_spread(e.load(buffer, offset + part, min(size, 64)), 64), "table") for part in range(0, size, 64)
        ]

    def lookup(self, e: Emitter, tables: Sequence[Any], index: Any, bits: int) -> Any:
        """Permutations of 64 entries, of two tables of 64, or of two such pairs."""
        where = _bits(index, "uint8x64")
        if len(tables) == 1:
            return e.bind(tirx.call_llvm_pure_intrin("uint8x64", "llvm.x86.avx512.permvar.qi.512", tables[0], where))
        pairs = [
            tirx.call_llvm_pure_intrin("uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", low, where, high)
            for low, high in zip(tables[::2], tables[1::2], strict=True)
        ]
        if len(pairs) == 1:
            return e.bind(pairs[0])
        return e.bind(tirx.Select(where < tirx.const(128, "uint8x64"), pairs[0], pairs[1]))


class Neon(Isa):
    """128-bit Arm (Armv8.0): table look-ups of 16 to 64 entries; products widen to 16 bits."""

    name, arch = "neon", "aarch64"
    needs: ClassVar[tuple[str, ...]] = ("neon",)
    width, registers, cpu = 16, 32, "generic"
    attributes: ClassVar[tuple[str, ...]] = ("+neon",)
    signed = True

    def tables(self, e: Emitter, buffer: Any, offset: int, bits: int) -> list[Any]:
        """One vector for each sixteen entries."""
        return [e.load(buffer, offset + 16 * part, 16, "table") for part in range(max(1, 2**bits // 16))]

    def lookup(self, e: Emitter, tables: Sequence[Any], index: Any, bits: int) -> Any:
        """Look up 64 entries at a time; an index outside of a table leaves the value as it was."""
        where = index & tirx.const(0x0F0F0F0F, "uint32x4") if bits <= 4 else index
        where = e.bind(_bits(where, "uint8x16"))
        count = min(len(tables), 4)
        values = tirx.call_llvm_pure_intrin("uint8x16", f"llvm.aarch64.neon.tbl{count}", *tables[:count], where)
        for part in range(4, len(tables), 4):
            further = where - tirx.const(16 * part, "uint8x16")
            values = tirx.call_llvm_pure_intrin(
                "uint8x16", "llvm.aarch64.neon.tbx4", values, *tables[part : part + 4], further
            )
        return e.bind(values)

    def dot(self, total: Any, codes: Any, x: Any) -> Any:
        """Widening products of both halves, and pairwise sums."""
        codes = tirx.reinterpret("int8x16", codes)

        def half(value: Any, part: int) -> Any:
            return shuffle([value], [8 * part + i for i in range(8)])

        def pairs(part: int) -> Any:
            wide = tirx.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull", half(codes, part), half(x, part))
            return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", wide)

        return total + tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", pairs(0), pairs(1))


class Dotprod(Neon):
    """Arm with the dot products of Armv8.2."""

    name = "dotprod"
    integers_only = True
    needs: ClassVar[tuple[str, ...]] = ("neon", "dotprod")
    attributes: ClassVar[tuple[str, ...]] = ("+neon", "+dotprod")

    def dot(self, total: Any, codes: Any, x: Any) -> Any:
        """One instruction."""
        return tirx.call_llvm_pure_intrin(
            "int32x4", "llvm.aarch64.neon.sdot", total, tirx.reinterpret("int8x16", codes), x
        )


# Best first.
ISAS: tuple[Isa, ...] = (Avx512Vbmi(), Avx512Vnni(), Avx512(), AvxVnni(), Avx2(), Dotprod(), Neon())


def isa_named(name: str) -> Isa:
    """Return the instruction set of a name (KeyError if there is none)."""
    return {isa.name: isa for isa in (*ISAS, Portable())}[name]
