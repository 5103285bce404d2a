"""Sixteen floats at a time inside numba functions: `kernel` turns a short emitting function into a numba intrinsic.

numba alone vectorises the operator's loops badly (2 to 3 times slower, measured). Here a kernel is a Python function that
runs once, at compile time, and writes LLVM instructions on <16 x float> values; LLVM maps them to AVX-512, splits them for
AVX2, SSE or NEON. Arrays arrive as pointers, integers and floats as run-time scalars, and a tuple as the compile-time
integer `len(tuple)`: that is how channel count and window size unroll the code.
"""

import inspect
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing import Signature
from numba.extending import intrinsic

LANES = 16
inner = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # of functions that compiled ones alone call
_FLOAT, _INDEX, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


class Value:
    """An integer, a float or sixteen floats that the emitted code computes; operators emit the matching instruction."""

    __slots__ = ("b", "v")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.b, self.v = builder, value

    def _other(self, other: "Value | float") -> ir.Value:
        return other.v if isinstance(other, Value) else _constant(other) if self.v.type == _VECTOR else ir.Constant(self.v.type, other)

    def like(self, number: float) -> "Value":
        """A constant of the same type."""
        return Value(self.b, self._other(number))

    def __add__(self, other: "Value | float") -> "Value":
        emit = self.b.add if self.v.type == _INDEX else self.b.fadd
        return Value(self.b, emit(self.v, self._other(other)))

    def __sub__(self, other: "Value | float") -> "Value":
        emit = self.b.sub if self.v.type == _INDEX else self.b.fsub
        return Value(self.b, emit(self.v, self._other(other)))

    def __mul__(self, other: "Value | float") -> "Value":
        emit = self.b.mul if self.v.type == _INDEX else self.b.fmul
        return Value(self.b, emit(self.v, self._other(other)))

    def fma(self, factor: "Value", addend: "Value | float") -> "Value":
        """self * factor + addend, rounded once."""
        return Value(self.b, self.b.call(_function(self.b, "llvm.fma", 3), [self.v, factor.v, self._other(addend)]))

    def where(self, comparison: str, other: "Value | float", yes: "Value | float", no: "Value | float") -> "Value":
        """Lane by lane: yes where `self comparison other`, else no."""
        compare = self.b.icmp_signed if self.v.type == _INDEX else self.b.fcmp_ordered
        return Value(self.b, self.b.select(compare(comparison, self.v, self._other(other)), self._other(yes), self._other(no)))

    def at_least(self, other: "Value | float") -> "Value":
        """The larger of the two; NaN stays NaN."""
        return self.where("<", other, other, self)

    def at_most(self, other: "Value | float") -> "Value":
        """The smaller of the two; NaN stays NaN."""
        return self.where(">", other, other, self)

    def halved(self) -> "Value":
        """Half of a non-negative integer, rounded down."""
        return Value(self.b, self.b.lshr(self.v, ir.Constant(_INDEX, 1)))

    def magnitude(self) -> "Value":
        return Value(self.b, self.b.call(_function(self.b, "llvm.fabs", 1), [self.v]))

    def exp2(self) -> "Value":
        """2^self to 1e-7 relative, for self >= -126: nearest integer into the exponent, a polynomial for the rest."""
        whole = Value(self.b, self.b.call(_function(self.b, "llvm.rint", 1), [self.v]))
        rest = self - whole
        result = self.like(_EXP2[0])
        for coefficient in _EXP2[1:]:
            result = result.fma(rest, coefficient)
        shifted = self.b.shl(self.b.fptosi(whole.v, _WORDS), ir.Constant(_WORDS, [23] * LANES))
        return Value(self.b, self.b.bitcast(self.b.add(self.b.bitcast(result.v, _WORDS), shifted), _VECTOR))


# 2^x on [-1/2, 1/2] at the seven Chebyshev nodes, highest power first: 3e-9 relative, exactly 1 at 0
_EXP2 = (
    0.00015461444724808513, 0.0013400428177711937, 0.00961805667843204, 0.05550327226669895, 0.24022650922289554, 0.6931472067028329, 1.0,
)  # fmt: skip


def _function(builder: ir.IRBuilder, name: str, operands: int) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * operands), f"{name}.v{LANES}f32")


def _constant(number: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(number)] * LANES)


def splat(value: Value) -> Value:
    """Sixteen copies of a run-time float."""
    first = value.b.insert_element(ir.Constant(_VECTOR, ir.Undefined), value.v, ir.Constant(_WORD, 0))
    return Value(value.b, value.b.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_WORDS, [0] * LANES)))


def window(left: Value, right: Value, shift: int) -> Value:
    """Lanes shift .. shift + 15 of the thirty-two lanes left, right."""
    if shift == 0:
        return left
    lanes = ir.Constant(_WORDS, [shift + lane for lane in range(LANES)])
    return Value(left.b, left.b.shuffle_vector(left.v, right.v, lanes))


class Pointer:
    """The data of a one-dimensional float32 array, addressed in floats; no alignment is assumed."""

    __slots__ = ("b", "v")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.b, self.v = builder, value

    def _at(self, index: Value) -> ir.Value:
        return self.b.bitcast(self.b.gep(self.v, [index.v]), _VECTOR.as_pointer())

    def load(self, index: Value) -> Value:
        return Value(self.b, self.b.load(self._at(index), align=4))

    def store(self, index: Value, value: Value) -> None:
        self.b.store(value.v, self._at(index), align=4)


def zeros(beside: Value, count: int) -> list[Value]:
    """`count` times sixteen zeros, in the code that `beside` belongs to."""
    return [Value(beside.b, _constant(0.0)) for _ in range(count)]


def loop(count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]) -> list[Value]:
    """for i in range(count): carried = body(i, carried); the carried values stay in registers."""
    builder, before = count.b, count.b.block
    head, inside, after = (builder.append_basic_block(name) for name in ("loop", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_INDEX)
    index.add_incoming(ir.Constant(_INDEX, 0), before)
    phis = []
    for value in carried:
        phi = builder.phi(value.v.type)
        phi.add_incoming(value.v, before)
        phis.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, count.v), inside, after)
    builder.position_at_end(inside)
    results = body(Value(builder, index), [Value(builder, phi) for phi in phis])
    index.add_incoming(builder.add(index, ir.Constant(_INDEX, 1)), builder.block)
    for phi, result in zip(phis, results, strict=True):
        phi.add_incoming(result.v, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return [Value(builder, phi) for phi in phis]


def each(count: Value, body: Callable[[Value], None]) -> None:
    """for i in range(count): body(i)."""

    def once(i: Value, _: list[Value]) -> list[Value]:
        body(i)
        return []

    loop(count, [], once)


def each_vector(rows: Value, vectors: Value, body: Callable[[Value, Value], None]) -> None:
    """body(row, x) for all rows, and x the places 0, 16, 32, ... of a row's vectors."""
    each(rows, lambda row: each(vectors, lambda j: body(row, j * LANES)))


def kernel(emit: Callable[..., None]) -> Callable[..., None]:
    """A numba intrinsic whose code is what emit(*arguments) writes, once per combination of static integers."""
    names = inspect.signature(emit).parameters

    def typed(_context: object, *arguments: types.Type) -> tuple[Signature, Callable[..., ir.Value]]:
        static = [argument.count if isinstance(argument, types.UniTuple) else None for argument in arguments]

        def lower(context: BaseContext, builder: ir.IRBuilder, signature: Signature, values: Sequence[ir.Value]) -> ir.Value:
            passed = [
                _lowered(context, builder, kind, value) for kind, value, fixed in zip(signature.args, values, static) if fixed is None
            ]
            label = "_".join(str(fixed) for fixed in static if fixed is not None)
            function_type = ir.FunctionType(ir.VoidType(), [value.type for value in passed])
            function = cgutils.get_or_insert_function(builder.module, function_type, f"sslsr_{emit.__name__}_{label}")
            if function.is_declaration:
                _write(function, emit, static)
            builder.call(function, passed)
            return context.get_dummy_value()

        return types.none(*arguments), lower

    parameter = inspect.Parameter
    typed.__signature__ = inspect.Signature([parameter(name, parameter.POSITIONAL_ONLY) for name in ("context", *names)])  # type: ignore[attr-defined]
    typed.__name__ = emit.__name__
    return intrinsic(typed)


def _lowered(context: BaseContext, builder: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    if isinstance(kind, types.Array):
        return context.make_array(kind)(context, builder, value).data
    wide = types.float32 if isinstance(kind, types.Float) else types.int64
    return context.cast(builder, value, kind, wide)


def _write(function: ir.Function, emit: Callable[..., None], static: Sequence[int | None]) -> None:
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    incoming = ((Pointer if isinstance(value.type, ir.PointerType) else Value)(builder, value) for value in function.args)
    arguments = [next(incoming) if fixed is None else fixed for fixed in static]
    emit(*arguments)
    if not builder.block.is_terminated:
        builder.ret_void()
