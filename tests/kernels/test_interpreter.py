"""The guard of Triton's interpreter: it catches each planted bug, and passes the right kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from . import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(
    not interpreter.is_active(), reason="kernels are compiled here, not interpreted"
)

BF16 = torch.bfloat16


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(got, expected):
    """Bit for bit, but that any NaN equals any other."""
    assert got.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


def hard_floats(n):
    """Each scale, halves between two values of bf16 and of tf32, zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32)
    pattern[: n // 4] = pattern[: n // 4] & ~0xFFFF | 0x8000
    pattern[n // 4 : n // 2] = pattern[n // 4 : n // 2] & ~0x1FFF | 0x1000
    x = pattern.view(torch.float32)
    x[-6:] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])
    # that carry into the sign, and that would become infinite
    pattern[-8:-6] = torch.tensor([0x7FFFFFFF, 0x7F800001])
    return x


# bf16


@triton.jit
def copy(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, BF16, torch.float16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, BF16, torch.float16])
def test_casts(source, target):
    x = hard_floats(1024)
    x = bits(x) >> 8 if source == torch.int32 else x.to(source)
    y = torch.empty(1024, dtype=target)
    copy[(1,)](x, y, 1024)
    assert_same(y, x.to(torch.float32).to(target))


@triton.jit
def arithmetic(X, Y, Z, OUT, SMALLER, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y, z = tl.load(X + at), tl.load(Y + at), tl.load(Z + at)
    tl.store(OUT + at, x + y)
    tl.store(OUT + N + at, x - y)
    tl.store(OUT + 2 * N + at, x * y)
    tl.store(OUT + 3 * N + at, x / y)
    tl.store(OUT + 4 * N + at, tl.fma(x, y, z))
    tl.store(OUT + 5 * N + at, tl.minimum(x, y))
    tl.store(OUT + 6 * N + at, tl.maximum(x, y))
    tl.store(OUT + 7 * N + at, tl.abs(x))
    tl.store(OUT + 8 * N + at, tl.where(x > y, x, y * 2.5))
    tl.store(OUT + 9 * N + at, tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z)))
    tl.store(OUT + 10 * N + at, tl.clamp(x, y - 1, y + 0.5, tl.PropagateNan.ALL))
    tl.store(OUT + 11 * N + at, x + tl.full((N,), 0.3, tl.bfloat16))
    tl.store(OUT + 12 * N + at, -x)
    tl.store(SMALLER + at, (x < y) & (y != z))


def test_bf16_arithmetic():
    generator = torch.Generator().manual_seed(1)
    x, y, z = torch.randn(3, 1024, generator=generator).to(BF16)
    x[:2], y[1:3] = torch.nan, torch.nan
    out, smaller = torch.empty(13, 1024, dtype=BF16), torch.empty(1024, dtype=torch.bool)
    arithmetic[(1,)](x, y, z, out, smaller, 1024)
    fma, third = (x.float() * y.float() + z.float()).to(BF16), torch.tensor(0.3, dtype=BF16)
    expected = [x + y, x - y, x * y, x / y, fma, x.fmin(y), x.fmax(y), x.abs()]
    expected += [torch.where(x > y, x, y * 2.5), x.fmax(y.fmin(z)).fmin(y.fmax(z))]
    expected += [x.maximum(y - 1).minimum(y + 0.5), x + third, -x]
    for got, value in zip(out, expected, strict=True):
        assert_same(got, value)
    assert torch.equal(smaller, (x < y) & (y != z))


@triton.jit
def product(A, B, OUT, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + rows[:, None] * K + inner[None, :])
    b = tl.load(B + inner[:, None] * N + rows[None, :])
    tl.store(OUT + rows[:, None] * N + rows[None, :], tl.dot(a, b, input_precision=PRECISION))


def dot(a, b, precision):
    out = torch.empty(a.shape[0], a.shape[0])
    product[(1,)](a, b, out, *a.shape, precision)
    return out


def test_bf16_dot():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-9, 9, (32, 32), generator=generator).to(BF16) for _ in range(2))
    assert torch.equal(dot(a, b, "ieee"), a.float() @ b.float())


@triton.jit
def reduction(X, Y, KIND: tl.constexpr, WIDE: tl.constexpr):
    x = tl.load(X + tl.arange(0, 64))
    if WIDE:
        x = x.to(tl.float32)
    if KIND == "sum":
        tl.store(Y, tl.sum(x, 0))
    elif KIND == "max":
        tl.store(Y, tl.max(x, 0))
    else:
        tl.store(Y + tl.arange(0, 64), tl.associative_scan(x, 0, larger))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


def test_bf16_reductions_are_refused():
    x = torch.arange(64.0).to(BF16)
    for kind in ("sum", "scan"):
        with pytest.raises(NotImplementedError, match=r"x\.to\(tl\.float32\)"):
            reduction[(1,)](x, torch.empty(64), kind, False)
    for kind, wide, expected in (("sum", True, 2016), ("scan", True, 63), ("max", False, 63)):
        y = torch.empty(64)
        reduction[(1,)](x, y, kind, wide)
        assert y[-1 if kind == "scan" else 0] == expected


@triton.jit
def accumulate(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(Y + at, tl.load(X + at))


def test_bf16_atomics_are_refused():
    with pytest.raises(NotImplementedError, match="bf16"):
        accumulate[(2,)](torch.ones(16, dtype=BF16), torch.zeros(16, dtype=BF16), 16)
    y = torch.zeros(16)
    accumulate[(2,)](torch.ones(16), y, 16)
    assert torch.equal(y, torch.full((16,), 2.0))


# Bounds


@triton.jit
def move(X, Y, M, N, stride_xm, stride_ym, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(X + rows[:, None] * stride_xm + columns[None, :] * STRIDE, inside, 0.0)
    tl.store(Y + rows[:, None] * stride_ym + columns[None, :], x, inside)


def test_bounds_of_a_view():
    storage = torch.randn(40, 16)
    x, y = storage[4:24], torch.zeros(20, 16)
    move[(2,)](x, y, 20, 16, 16, 16, 1, 16)
    assert torch.equal(x, y)
    with pytest.raises(AssertionError, match=r"load: 16 of .* program \(1, 0, 0\).* end of X"):
        move[(2,)](x, torch.zeros(21, 16), 21, 16, 16, 16, 1, 16)
    with pytest.raises(AssertionError, match=r"store: 16 of .* program \(1, 0, 0\).* end of Y"):
        move[(2,)](storage[4:25], y, 21, 16, 16, 16, 1, 16)


def test_bounds_within_the_gaps_of_a_view():
    storage, y = torch.randn(20, 16), torch.zeros(20, 16)
    move[(2,)](storage[:, 3:11], y, 20, 8, 16, 16, 1, 16)
    assert torch.equal(storage[:, 3:11], y[:, :8])
    with pytest.raises(AssertionError, match="gap that the strides of X leave"):
        move[(2,)](storage[:, 3:11], y, 20, 9, 16, 16, 1, 16)
    # every other column
    move[(2,)](storage[:, ::2], y, 20, 8, 16, 16, 2, 16)
    assert torch.equal(storage[:, ::2], y[:, :8])
    with pytest.raises(AssertionError, match="gap that the strides of X leave"):
        move[(2,)](storage[:, ::2], y, 20, 8, 16, 16, 1, 16)
    # and the stride of a single element says nothing
    with pytest.raises(AssertionError, match="gap that the strides of X leave"):
        move[(2,)](storage.as_strided((20, 1, 8), (16, 3, 2)), y, 20, 8, 16, 16, 1, 16)
    # a row for all
    move[(2,)](storage[:1].expand(20, 16), y, 20, 16, 0, 16, 1, 16)
    assert torch.equal(y, storage[:1].expand(20, 16))


def test_bounds_of_windows_that_overlap():
    # with gaps in the first row, which the second fills
    y = torch.zeros(2, 3)
    move[(1,)](torch.arange(8.0).as_strided((2, 3), (3, 2)), y, 2, 3, 3, 3, 2, 16)
    assert y.tolist() == [[0, 2, 4], [3, 5, 7]]
    x = torch.arange(30.0).unfold(0, 6, 2)
    y = torch.zeros(13, 6)
    move[(1,)](x, y, 13, 6, 2, 6, 1, 16)
    assert torch.equal(x, y)
    with pytest.raises(AssertionError, match="past the end of X"):
        move[(1,)](x, torch.zeros(14, 6), 14, 6, 2, 6, 1, 16)


def test_tensors_without_elements():
    move[(1,)](torch.zeros(0, 4), torch.zeros(0, 4), 0, 4, 4, 4, 1, 16)
    with pytest.raises(AssertionError, match="no argument has elements"):
        move[(1,)](torch.zeros(0, 4), torch.zeros(0, 4), 1, 4, 4, 4, 1, 16)


@triton.jit
def add_both(pair, Y, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(pair[0] + at, at < 4, 0.0) + tl.load(pair[1] + at, at < N, 0.0)
    tl.store(Y + at, x, at < 4)


def test_bounds_of_a_tuple():
    pair, y = (torch.ones(9)[:4], torch.ones(9)[:5]), torch.zeros(4)
    add_both[(1,)](pair, y, 5, 8)
    assert torch.equal(y, torch.full((4,), 2.0))
    with pytest.raises(AssertionError, match=r"load: 1 of .* end of pair\[1\]"):
        add_both[(1,)](pair, y, 6, 8)


@triton.jit
def one_of_two(X, Y, OUT, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(tl.where(at < N, X + at, Y + at)))


def test_bounds_of_lanes_in_several_views():
    x, y, out = torch.zeros(8)[:5], torch.ones(8), torch.empty(8)
    one_of_two[(1,)](x, y, out, 5, 8)
    assert out.tolist() == [0] * 5 + [1] * 3
    with pytest.raises(AssertionError, match=r"load: 1 of 8 lanes .* 0 bytes past the end of X"):
        one_of_two[(1,)](x, y, out, 6, 8)


@triton.jit
def move_tile(descriptor, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = descriptor.load([0, 0])
    tl.store(Y + at[:, None] * BLOCK + at[None, :], x)


def test_bounds_of_a_descriptor():
    TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    storage, y = torch.randn(20, 16), torch.empty(16, 16)
    x = storage[:12]
    move_tile[(1,)](TensorDescriptor(x, [12, 16], [16, 1], [16, 16]), y, 16)
    assert torch.equal(y[:12], x) and not y[12:].any()
    with pytest.raises(AssertionError, match=r"load: 16 of .* end of descriptor"):
        move_tile[(1,)](TensorDescriptor(x, [13, 16], [16, 1], [16, 16]), y, 16)


@triton.jit
def swap(X, Y, EXCHANGE: tl.constexpr):
    if EXCHANGE:
        tl.store(Y, tl.atomic_cas(X + 4, 0, 1))
    else:
        tl.store(Y, tl.atomic_max(X + 4, 5))


def test_bounds_of_atomics():
    x, y = torch.zeros(6, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    for exchange, before, after in ((True, 0, 1), (False, 1, 5)):
        swap[(1,)](x[:5], y, exchange)
        assert y.item() == before and x.tolist() == [0, 0, 0, 0, after, 0]
        with pytest.raises(AssertionError, match=r"atomic: 1 of 1 .* end of X"):
            swap[(1,)](x[:4], y, exchange)
    with pytest.raises(AssertionError, match=r"atomic: 15 of 16 .* end of Y"):
        accumulate[(1,)](torch.ones(16), torch.zeros(9)[:1], 16)


# What a mask leaves out


@triton.jit
def load_some(X, Y, N, CHOOSE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at, at < N)
    if CHOOSE:
        x = tl.where(at < N, x, 0)
    tl.store(Y + at, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, torch.int32, torch.uint8])
def test_poison(dtype):
    x, y = torch.ones(9, dtype=dtype), torch.empty(16, dtype=dtype)
    load_some[(1,)](x, y, 9, True, 16)
    assert y.tolist() == [1] * 9 + [0] * 7
    load_some[(1,)](x, y, 9, False, 16)
    assert y[:9].eq(1).all()
    if dtype.is_floating_point:
        assert y[9:].isnan().all()
    else:
        assert y[9:].eq(0x5A5A5A5A if dtype == torch.int32 else 0x5A).all()


# Assertions


@triton.jit
def asserts(X, LIMIT, BLOCK: tl.constexpr):
    x = tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.device_assert(x < LIMIT, "too large")


def test_device_assert():
    asserts[(2,)](torch.arange(32), 32, 16)
    with pytest.raises(AssertionError, match=r"too large \(program \(1, 0, 0\)\)"):
        asserts[(2,)](torch.arange(32), 31, 16)


@triton.jit
def integers(X, Y, OP: tl.constexpr, WIDE: tl.constexpr):
    at = tl.arange(0, 4)
    x, y = tl.load(X + at), tl.load(Y)
    if WIDE:
        x = x.to(tl.int64)
    if OP == "add":
        x = x + y
    elif OP == "sub":
        x = x - y
    else:
        x = x * y
    tl.store(X + at, x.to(X.dtype.element_ty))


@pytest.mark.parametrize(
    ("op", "x", "y"),
    [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15), ("mul", -(2**16), 2**16)],
)
def test_overflow(op, x, y):
    def launch(x, y, dtype, wide=False):
        x, y = torch.tensor([0, 0, x, 0], dtype=dtype), torch.tensor([y], dtype=dtype)
        integers[(1,)](x, y, op, wide)
        return int(x[2])

    with pytest.raises(AssertionError, match=rf"int32 overflow in {op} \(program \(0, 0, 0\)\)"):
        launch(x, y, torch.int32)
    exact = {"add": x + y, "sub": x - y, "mul": x * y}[op]
    assert launch(x, y, torch.int32, wide=True) == (exact + 2**31) % 2**32 - 2**31
    assert launch(x // 2, y // 2, torch.int32) == {"add": x // 2, "sub": x // 2}.get(op, exact // 4)
    assert launch(x % 2**32, y, torch.uint32) == exact % 2**32


@triton.jit
def multiply(X, Y, LOW, HIGH, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(LOW + at, x * y)
    tl.store(HIGH + at, tl.umulhi(x, y))


def test_unsigned_products():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 2**32, (2, 256), generator=generator)
    low, high = torch.empty(2, 256, dtype=torch.uint32)
    multiply[(1,)](x.to(torch.uint32), y.to(torch.uint32), low, high, 256)
    exact = [a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert low.tolist() == [value % 2**32 for value in exact]
    assert high.tolist() == [value >> 32 for value in exact]


@triton.jit
def high_half(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.umulhi(tl.load(X + at), tl.load(Y + at)))


def test_umulhi_takes_signed_integers_as_unsigned():
    x, y = torch.randint(-(2**31), 2**31, (2, 256), generator=torch.Generator().manual_seed(4))
    high = y.to(torch.int32)
    high_half[(1,)](x.to(torch.int32), high, 256)
    exact = [(a % 2**32) * (b % 2**32) >> 32 for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert [value % 2**32 for value in high.tolist()] == exact


@triton.jit
def draw(OUT, N: tl.constexpr):
    zero = tl.zeros((N,), tl.uint32)
    a, b, c, d = tl.philox(0, zero, zero, zero, zero, 7)
    at = OUT + 4 * tl.arange(0, N)
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)


def test_philox_may_wrap():
    out = torch.empty(1, 4, dtype=torch.uint32)
    draw[(1,)](out, 1)
    # Random123's vector for 7 rounds, of zeros
    assert out[0].tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


# Dots


@pytest.mark.parametrize(("dtype", "K"), [(BF16, 8), (torch.float32, 8), (torch.int8, 16)])
def test_short_dots_are_refused(dtype, K):
    with pytest.raises(AssertionError, match="K >="):
        dot(torch.ones(16, K).to(dtype), torch.ones(K, 16).to(dtype), "ieee")
    assert dot(torch.ones(16, 32).to(dtype), torch.ones(32, 16).to(dtype), "ieee").eq(32).all()


def test_tf32():
    x = hard_floats(1024).reshape(32, 32).nan_to_num(0, 1, 1).frexp().mantissa
    eye = torch.eye(32)
    unit = 2.0**-11  # of tf32, at [0.5, 1)
    rounded = x.sign() * (x.abs() / unit + 0.5).floor() * unit
    assert not torch.equal(rounded, x)
    # None is what Triton's own default is, on a GPU as here
    for precision, expected in (("tf32", rounded), (None, rounded), ("tf32x3", x), ("ieee", x)):
        assert torch.equal(dot(x, eye, precision), expected)
        assert torch.equal(dot(eye, x, precision), expected)


def test_tf32_leaves_what_is_not_finite():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, torch.nan])
    bits(special)[-1] = 0x7FFFFFFF
    got = torch.from_numpy(interpreter.round_to_tf32(special.numpy()))
    assert_same(got, special)


# Programs


@triton.jit
def take_number(COUNT, ORDER):
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2)
    tl.store(ORDER + at + tl.program_id(2), tl.atomic_add(COUNT, 1))


def order(*grid):
    number = torch.full(grid, -1, dtype=torch.int32)
    take_number[grid](torch.zeros(1, dtype=torch.int32), number)
    return number.flatten().tolist()


@pytest.mark.parametrize("grid", [(2,), (3, 1, 2), (4, 5, 3)])
def test_programs_run_in_another_order(grid):
    numbers = order(*grid)
    everyone = list(range(len(numbers)))
    assert sorted(numbers) == everyone
    assert numbers != everyone and numbers[0] != 0
    assert len(numbers) == 2 or numbers != everyone[::-1]
    assert order(*grid) == numbers
    assert order(1) == [0]


@triton.jit
def write(Y, N, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(Y + at, at, at < N)


def test_two_programs_that_write_one_element():
    y = torch.empty(60, dtype=torch.int32)
    write[(4,)](y, 60, 16, 16)
    assert torch.equal(y, torch.arange(60, dtype=torch.int32))
    with pytest.raises(AssertionError, match=r"race: a store of program \(\d, 0, 0\) .* in Y"):
        write[(4,)](y, 60, 15, 16)
    with interpreter.races_allowed():
        write[(4,)](y, 60, 15, 16)
    with pytest.raises(AssertionError, match="race"):
        write[(4,)](y, 60, 15, 16)


@triton.jit
def shift(X, Y, Z, BY: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + (at + BY) * STEP))


def test_a_program_that_reads_what_another_writes():
    x = torch.arange(65.0)
    shift[(4,)](x, torch.empty(64), None, 1, 1, 16)
    shift[(4,)](x, x, None, 0, 1, 16)
    shift[(1,)](x, x, None, 1, 1, 64)
    with pytest.raises(AssertionError, match="race"):
        shift[(4,)](x, x, None, 1, 1, 16)
    # two arguments that share memory
    with pytest.raises(AssertionError, match="race"):
        shift[(4,)](x[1:], x[:64], None, 0, 1, 16)
    # the upper halves of other programs' elements
    halves = x.view(torch.int16)[1:]
    shift[(4,)](halves, x, None, 0, 2, 16)
    with pytest.raises(AssertionError, match="race"):
        shift[(3,)](halves, x, None, 16, 2, 16)


@triton.jit
def spread(X, Y, Z, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + 2 * at, tl.load(X + at))


def test_races_in_memory_that_several_arguments_share():
    storage = torch.arange(200.0)
    y, between = storage[:128:2], storage[1:3]
    spread[(4,)](storage[128:], y, between, 16)
    for x in (storage[1:65], storage[5:69]):
        with pytest.raises(AssertionError, match="race"):
            spread[(4,)](x, y, between, 16)


@triton.jit
def read_all_write_one(X):
    x = tl.load(X)
    if tl.program_id(0) == 0:
        tl.store(X, x + 1)


def test_a_program_that_writes_what_others_have_read():
    # program 0 is the last of two, and the last reader
    with pytest.raises(AssertionError, match="touches what several programs touched"):
        read_all_write_one[(2,)](torch.zeros(1))
    read_all_write_one[(1,)](torch.zeros(1))


def test_no_race_is_looked_for_in_gigabytes():
    y = torch.empty(interpreter.MOST_CELLS + 1, dtype=torch.uint8)
    write[(2,)](y, 31, 15, 16)
    assert y[:31].tolist() == list(range(31))
    with pytest.raises(AssertionError, match="race"):
        write[(2,)](y[:-1], 31, 15, 16)


@triton.jit
def collide(X, Y, EACH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at // EACH, tl.load(X + at))


def test_lanes_that_collide():
    x = torch.randn(16).repeat_interleave(2)
    y = torch.empty(16)
    collide[(1,)](x, y, 2, 32)
    assert torch.equal(y, x[::2])
    with pytest.raises(AssertionError, match="different values"):
        collide[(1,)](x, y, 4, 32)


# The guard as a whole


@triton.jit
def fails(X, KIND: tl.constexpr):
    nested(X, KIND)


@triton.jit
def nested(X, KIND: tl.constexpr):
    if KIND == "type":
        tl.load(1.5)
    else:
        tl.load(X + 1)


def test_errors_are_not_wrapped_and_leave_nothing_behind():
    with pytest.raises(AssertionError, match="0 bytes past the end of X"):
        fails[(1,)](torch.zeros(1), "bounds")
    with pytest.raises(AttributeError, match="float"):
        fails[(1,)](torch.zeros(1), "type")
    assert interpreter.triton_interpreter.interpreter_builder.launch is None
    fails[(1,)](torch.zeros(2), "bounds")


def test_installing_again_changes_nothing():
    module = interpreter.triton_interpreter
    before = vars(module).copy()
    interpreter.install()
    assert vars(module) == before


LATE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("interpreter", sys.argv[1])
guard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guard)
assert "triton" not in sys.modules and not guard.is_active()
with guard.races_allowed():
    pass
if sys.argv[2] == "late":
    import triton.language
guard.install()
assert guard.is_active()
import torch
spec = importlib.util.spec_from_file_location("kernels", sys.argv[3])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
y = torch.zeros(1)
kernels.total[(1,)](torch.ones(16, dtype=torch.bfloat16), y, 16)
assert y == 16 * (16 + 1)
"""

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def total(X, Y, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(Y, tl.sum(x) * (x.sum(0) + tl.max(x, 0)))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_installing_before_and_after_triton_was_imported(when, tmp_path):
    kernels = tmp_path / "kernels.py"
    kernels.write_text(KERNELS)
    environment = {key: os.environ[key] for key in os.environ if key != "TRITON_INTERPRET"}
    source = Path(interpreter.__file__)
    subprocess.run(
        [sys.executable, "-c", LATE, str(source), when, str(kernels)], env=environment, check=True
    )
