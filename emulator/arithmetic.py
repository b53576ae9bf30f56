"""Arithmetic of PTX on NumPy vectors over lanes; an operand that is a constant is a NumPy scalar."""

import functools

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
where = np.where
_SMALLEST_NORMAL = f4(2.0**-126)


def flush(x):
    """Subnormal numbers become zero, as .ftz says."""
    return where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(f4(0), x), x)


def saturate(x):
    """To [0, 1]; NaN becomes 0."""
    return where(np.isnan(x), f4(0), np.clip(x, f4(0), f4(1)))


def fma(a, b, c):
    # The product is exact in float64; the sum is rounded twice, which differs from once in one of 2^29 cases.
    return (a.astype(f8) * b + c).astype(f4)


def fma_down(a, b, c):
    exact = a.astype(f8) * b + c
    near = exact.astype(f4)
    return where(near > exact, np.nextafter(near, f4(-np.inf)), near)


def fma_to_zero(a, b, c):
    exact = a.astype(f8) * b + c
    near = exact.astype(f4)
    return where(np.abs(near) > np.abs(exact), np.nextafter(near, f4(0)), near)


def in_pairs(function, *operands):
    """f32x2: two float32 in 64 bits."""
    halves = [np.atleast_1d(operand).view(f4).reshape(-1, 2) for operand in operands]
    return function(*halves).view(u8)[:, 0]


def to_bf16(x):
    """The bits, rounded to nearest even."""
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def to_f16(x):
    return x.astype(f2).view(u2)


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def from_f16(bits):
    return bits.view(f2).astype(f4)


def packed(high, low):
    return (high.astype(u4) << u4(16)) | low


def to_integer(x, rounding, kind):
    """From float, clipped to the range of the integers; NaN becomes 0."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(f8))
    info = np.iinfo(kind)
    # The largest 64-bit integers are no floats: what would round up to beyond them is clipped as an integer.
    inside = np.clip(where(np.isnan(rounded), 0.0, rounded), float(info.min), np.nextafter(2.0**info.bits, 0))
    return where(rounded >= float(info.max), info.max, inside.astype(kind))


def divide(a, b):
    """Towards zero; by zero all bits are set."""
    zero = b == 0
    if a.dtype.kind == "u":
        return where(zero, ~a.dtype.type(0), a // where(zero, b.dtype.type(1), b))
    exact = a.astype(i8) / where(zero, 1, b) if a.dtype.itemsize < 8 else a // where(zero, 1, b)
    return where(zero, a.dtype.type(-1), np.trunc(exact).astype(a.dtype))


def remainder(a, b):
    return a - divide(a, b) * b


def mul_high(a, b):
    wide = i8 if a.dtype.kind == "i" else u8
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def shift_left(a, n):
    width = 8 * a.dtype.itemsize
    return where(n >= u4(width), a.dtype.type(0), a << np.minimum(n, u4(width - 1)).astype(a.dtype))


def shift_right(a, n):
    """Arithmetically for signed numbers."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, u4(width - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else where(n >= u4(width), a.dtype.type(0), shifted)


def permute_bytes(a, b, selector):
    both = (b.astype(u8) << u8(32)) | a
    result = u4(0)
    for i in range(4):
        pick = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((pick & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = where(byte & u4(128), u4(255), u4(0))
        result = result | (where(pick & u4(8), sign, byte) << u4(8 * i))
    return result


def leading_zeros(a):
    # The exponent of a float64 is the place of the highest bit of a 32-bit integer.
    return where(a == 0, u4(32), u4(31) - (np.frexp(a.astype(f8))[1] - 1).astype(u4))


def split_word(a, kind):
    """The parts of a register, lowest first."""
    parts = np.atleast_1d(a).view(kind)
    return parts.reshape(-1, a.dtype.itemsize // parts.itemsize).T.copy()


def joined(parts, kind):
    """A register of parts, lowest first."""
    return np.ascontiguousarray(np.stack(np.broadcast_arrays(*parts), -1)).view(kind)[..., 0]


def shuffle(a, b, c, mode, count):
    """shfl.sync: the value of another lane of the warp, and whether that lane was in range."""
    if np.ndim(a) == 0:
        a = np.full(count, a)
    if np.ndim(b) == 0 and np.ndim(c) == 0:
        source, inside = _sources(mode, int(b), int(c), count)
        return a[source], inside
    b, c = (np.broadcast_to(each, count).reshape(-1, 32).astype(i8) for each in (b, c))
    source, inside = _other_lanes(mode, b, c)
    return a[_of_block(source)], inside.reshape(-1)


@functools.cache
def _sources(mode, b, c, count):
    source, inside = _other_lanes(mode, b, c)
    warps = np.ones((count // 32, 1), bool)
    return _of_block(source * warps), (inside & warps).reshape(-1)


def _of_block(lanes):
    """Lanes of warps, a row for each, as places in an array of all."""
    return (lanes + 32 * np.arange(len(lanes))[:, None]).reshape(-1)


def _other_lanes(mode, b, c):
    lane, b, segment, clamp = np.arange(32), b & 31, (c >> 8) & 31, c & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"bfly": lane ^ b, "idx": first | (b & ~segment), "up": lane - b, "down": lane + b}[mode]
    inside = source >= last if mode == "up" else source <= last
    return where(inside, source, lane), inside


def vote(a, negated, count):
    """The predicates of each warp, a row of 32."""
    return (np.broadcast_to(a, count) ^ negated).reshape(-1, 32)


def of_warps(values):
    """One value per warp for all its lanes."""
    return np.repeat(values, 32)


def ballot(votes):
    return (votes.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
