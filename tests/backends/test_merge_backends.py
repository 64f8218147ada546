"""Merging on one backend and unmerging on the other, bit for bit; and the steps it is made of."""

import hashlib
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import fastlora
from fastlora import backends, merge
from fastlora.backends import native_merge, reference_merge, triton_merge
from fastlora.backends.reference_merge import BITS_OF, flip_negative
from fastlora.merge import Term

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_NATIVE, NO_TRITON = (backends.available("cpu")[name] for name in ("native", "triton"))

needs_native = pytest.mark.skipif(bool(NO_NATIVE), reason=f"native: {NO_NATIVE}")
needs_triton = pytest.mark.skipif(bool(NO_TRITON), reason=f"triton: {NO_TRITON}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# native's for CUDA tensors run on the emulated device
EMULATED = pytest.param("emulated", id="cuda")
COMPILED = [pytest.param(native_merge, id="native", marks=needs_native), EMULATED]
each_compiled = pytest.mark.parametrize("kernels", COMPILED, indirect=True)
each_kernels = pytest.mark.parametrize(
    "kernels", [pytest.param(reference_merge, id="reference"), *COMPILED], indirect=True
)
# the others beside the reference, and how large a rank their kernels are tried with here
each_other = pytest.mark.parametrize(
    ("kernels", "most"),
    [
        pytest.param(native_merge, 64, id="native", marks=needs_native),
        pytest.param("emulated", 64, id="cuda"),
        pytest.param(triton_merge, 3, id="triton", marks=needs_triton),
    ],
    indirect=["kernels"],
)


@pytest.fixture
def kernels(request):
    if request.param != "emulated":
        return request.param
    if request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("there are no CUDA kernels for fp64")
    request.getfixturevalue("emulated")
    return torch.ops.fastlora_emulated


def bits(t):
    return t.contiguous().view(BITS_OF.get(t.dtype, t.dtype))


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def any_bits(shape, dtype):
    """Every kind of value: NaN, Inf, zeros and denormals of both signs among them."""
    info = torch.iinfo(BITS_OF[dtype])
    values = torch.randint(info.min, info.max, shape, dtype=BITS_OF[dtype]).view(dtype)
    tiny = torch.finfo(dtype).tiny / 2
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny], dtype=dtype)
    return torch.where(torch.rand(shape) < 0.3, odd[torch.randint(7, shape)], values)


def views(n, k, dtype):
    """Weights of shape (n, k) in different strides."""
    yield "contiguous", torch.empty(n, k, dtype=dtype)
    yield "transposed", torch.empty(k, n, dtype=dtype).t()
    yield "columns", torch.empty(n, k + 5, dtype=dtype)[:, 3 : 3 + k]
    yield "every other row", torch.empty(2 * n, k, dtype=dtype)[1::2]
    yield "every other column", torch.empty(n, 2 * k, dtype=dtype)[:, ::2]
    yield "broadcast layout", torch.empty(k, 3, n, dtype=dtype)[:, 1].t()


# ---- the steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(reference_merge, id="reference"),
        *COMPILED,
        pytest.param(triton_merge, id="triton", marks=needs_triton),
    ],
    indirect=True,
)
def test_every_16_bit_number_is_rounded_to_once(kernels, dtype):
    order = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    number = flip_negative(order).view(dtype).double()
    number = number[number.isfinite()]
    # beyond the largest, the next power of two would be the neighbour
    beyond = 2.0 ** math.ceil(math.log2(torch.finfo(dtype).max))
    below = torch.cat([number.new_tensor([-beyond]), number])
    above = torch.cat([number, number.new_tensor([beyond])])
    middle = (below + above) / 2
    even = torch.where(bits(below.to(dtype)) & 1 == 0, below, above)
    if kernels is triton_merge:
        # as many as the interpreter has the time for, among them the last
        middle, below, above, even = (
            t[len(t) % 17 - 1 :: 17] for t in (middle, below, above, even)
        )
    for value, expected in [
        (middle, even),
        (middle.nextafter(above), above),
        (middle.nextafter(below), below),
        (above, above),
    ]:
        expected = torch.where(expected.abs() < beyond, expected, expected * math.inf)
        base, one = torch.zeros(1, len(value), dtype=dtype), torch.ones(1, 1).double()
        rounded = kernels.add_low_rank(base, one, value[None], one, None)
        assert torch.equal(rounded.double().flatten(), expected)


@each_dtype
@pytest.mark.parametrize("r", [1, 3, 64])
@each_other
def test_sums_that_are_exact_are_the_same(kernels, most, r, dtype):
    if r > most:
        pytest.skip("takes the interpreter too long")
    torch.manual_seed(r)
    for n, k in [(1, 1), (1, 40), (37, 1), (33, 130), (70, 64)]:
        left = torch.randint(-(2**20), 2**20, (n, r)).double()
        right = torch.randint(-(2**20), 2**20, (r, k)).double()
        row_scale = torch.randn(n, 1).double() * 1e-13
        column_scale = torch.randn(1, k).double()
        for name, base in views(n, k, dtype):
            base.copy_(any_bits((n, k), dtype))
            for scale in (column_scale, None):
                expected, got = (
                    of.add_low_rank(base, left, right, row_scale, scale)
                    for of in (reference_merge, kernels)
                )
                is_nan = expected.isnan()
                assert torch.equal(got.isnan(), is_nan), name
                assert same(got.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0)), name


def corrections(dtype):
    """Predicted and exact values, and how many bits a code of the correction takes."""
    wide = 3 * 2 ** (8 * torch.finfo(dtype).bits // 16)
    for n, (largest, rare, expected) in itertools.product(
        [1, 7, 1023, 1025, 40_001],
        [
            (0, 0, {0}),
            (1, 0, {0, 2}),
            (1, 0.01, {2}),
            (7, 0.01, {4}),
            (127, 0.001, {8}),
            (wide, 0, {-1}),
        ],
    ):
        predicted = torch.randn(n).to(dtype)
        distance = torch.randint(-largest, largest + 1, (n,))
        distance += (torch.rand(n) < rare) * 1000
        order = flip_negative(bits(predicted)) + distance.to(BITS_OF[dtype])
        yield predicted, flip_negative(order).view(dtype), expected if n > 1023 else None
    for n in (64, 5000):
        yield any_bits((n,), dtype), any_bits((n,), dtype), None
        values = any_bits((n,), dtype)
        yield values, values.clone(), None


@each_dtype
@each_kernels
def test_a_correction_leads_to_the_exact_values(kernels, dtype):
    torch.manual_seed(0)
    seen = set()
    for predicted, exact, expected in corrections(dtype):
        correction = kernels.encode_correction(predicted, exact)
        for got, other in zip(
            correction, reference_merge.encode_correction(predicted, exact), strict=True
        ):
            assert got == other if isinstance(got, int) else same(got, other)
        seen.add(correction[0])
        if expected:
            assert correction[0] in expected
        if correction[0] < 0:
            assert same(correction[3], exact)
            assert correction[3].data_ptr() != exact.data_ptr()
        else:
            assert same(kernels.decode_correction(predicted, *correction), exact)
    assert seen == {-1, 0, 2, 4, 8}


@each_kernels
def test_a_correction_of_strided_values(kernels):
    torch.manual_seed(0)
    predicted = torch.randn(30, 50)
    exact = predicted.t().contiguous().t() * (1 + 2**-23)
    correction = kernels.encode_correction(predicted, exact)
    assert same(kernels.decode_correction(predicted.t().contiguous().t(), *correction), exact)


@each_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_prediction_can_be_corrected(kernels, dtype):
    torch.manual_seed(0)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    order = flip_negative(every)
    near = flip_negative((order + torch.randint(-3, 4, order.shape)).to(torch.int16))
    for predicted, exact in [(every, near), (near, every)]:
        predicted, exact = predicted.view(dtype), exact.view(dtype)
        correction = kernels.encode_correction(predicted, exact)
        assert correction[0] == 4
        assert same(kernels.decode_correction(predicted, *correction), exact)
        # the bits of NaN and the sign of 0 are not to be relied on
        other = predicted.where(predicted != 0, torch.zeros_like(predicted))
        other = other.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf)
        assert same(kernels.decode_correction(other, *correction), exact)


@each_compiled
def test_a_broken_correction_is_refused(kernels):
    predicted, exact = torch.randn(100), torch.randn(100)
    width, codes, escaped, values = kernels.encode_correction(predicted, predicted * 1.000001)
    decode = kernels.decode_correction
    with pytest.raises(ValueError, match="bits: got 3"):
        decode(predicted, 3, codes, escaped, values)
    with pytest.raises(ValueError, match="codes: got shape"):
        decode(predicted, width, codes[1:], escaped, values)
    with pytest.raises(ValueError, match="values: got shape"):
        decode(predicted, width, codes, escaped.new_zeros(len(values) + 1), values)
    with pytest.raises(TypeError, match="values: got dtype"):
        decode(predicted, width, codes, escaped, values.long())
    with pytest.raises(ValueError, match="predicted: got shape"):
        kernels.encode_correction(predicted[1:], exact)
    # places that are not in the weight are not written to
    far = torch.tensor([-1, 100, 2**31 - 1], dtype=torch.int32)
    zeros = torch.zeros(3, dtype=torch.int32)
    assert decode(predicted, width, codes, far, zeros).shape == (100,)


@each_dtype
@each_kernels
def test_the_checksum(kernels, dtype):
    torch.manual_seed(0)
    for n, k in [(1, 1), (13, 7), (300, 100)]:
        values = any_bits((n, k), dtype)
        expected = sum(b * (2 * i + 1) for i, b in enumerate(bits(values).flatten().tolist()))
        for name, view in views(n, k, dtype):
            view.copy_(values)
            assert (kernels.checksum(view) - expected) % 2**64 == 0, name


# ---- merging ------------------------------------------------------------------------------------


WAYS = [("native", "reference"), ("reference", "native"), ("native", "native")]
each_way = pytest.mark.parametrize(
    ("first", "second"), WAYS, ids=["native-reference", "reference-native", "native-native"]
)


def weights(n, k, dtype):
    yield "usual", torch.randn(n, k).mul(0.02).to(dtype)
    yield "any bits", any_bits((n, k), dtype)
    yield "zeros", (torch.rand(n, k) - 0.5).to(dtype) * 0.0
    yield "denormal", (torch.rand(n, k).double() * torch.finfo(dtype).tiny).to(dtype)


def merged(terms, scaling, old=None):
    record = merge.MergeRecord(terms, scaling, old)
    record.merge(terms, scaling)
    return record


@needs_native
@each_dtype
@each_way
def test_either_backend_unmerges_what_the_other_merged(first, second, dtype, monkeypatch):
    torch.manual_seed(0)
    # several blocks, the last one shorter
    monkeypatch.setattr(merge, "_BLOCK_ELEMENTS", 1 << 10)
    for (n, k), r, std in itertools.product(
        [(1, 1), (1, 75), (67, 1), (45, 67)], [1, 3, 64], [1e-3, 3.0]
    ):
        for (kind, values), (layout, weight) in itertools.product(
            weights(n, k, dtype), views(n, k, dtype)
        ):
            weight.copy_(values)
            term = Term(weight, torch.randn(n, r) * std, torch.randn(r, k) * std)
            with fastlora.use_backend(first):
                record = merged([term], -0.7)
            with fastlora.use_backend(second):
                record.unmerge([term])
            assert same(weight, values), (n, k, r, std, kind, layout)


@needs_native
@each_dtype
@each_way
def test_either_backend_switches_what_the_other_merged(first, second, dtype):
    torch.manual_seed(0)
    before = torch.randn(70, 50).mul(0.02).to(dtype)
    weight = before.clone()
    old, new = (Term(weight, torch.randn(70, 4) * 0.01, torch.randn(4, 50) * 0.1) for _ in range(2))
    with fastlora.use_backend(first):
        record = merged([old], 2.0)
    with fastlora.use_backend(second):
        record = merged([new], 0.3, record)
        switched, weight_again = weight.clone(), before.clone()
        merged([Term(weight_again, new.left, new.right)], 0.3)
        assert same(switched, weight_again)
    with fastlora.use_backend(first):
        record.unmerge([new])
    assert same(weight, before)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("first", "second"), [("triton", "reference"), ("reference", "triton")])
def test_triton_unmerges_what_the_reference_merged_and_back(first, second, dtype):
    torch.manual_seed(0)
    for n, k in [(1, 75), (45, 67)]:
        for kind, values in weights(n, k, dtype):
            weight = values.clone()
            term = Term(weight, torch.randn(n, 3) * 0.1, torch.randn(3, k) * 0.1)
            with fastlora.use_backend(first):
                record = merged([term], -0.7)
            assert kind == "any bits" or not same(weight, values)
            with fastlora.use_backend(second):
                record.unmerge([term])
            assert same(weight, values), (n, k, kind)


@needs_native
def test_convolutions_and_their_layouts():
    torch.manual_seed(0)
    for factorization, layout in itertools.product(
        ["loralib", "locon", "tucker"], [torch.contiguous_format, torch.channels_last]
    ):
        layer = fastlora.Conv2d(8, 6, 3, r=2, groups=2, factorization=factorization)
        layer.weight.data = layer.weight.data.to(memory_format=layout)
        for parameter in layer.lora_parameters().values():
            parameter.data.normal_()
        before = layer.weight.detach().clone()
        for first, second in WAYS:
            with fastlora.use_backend(first):
                layer.merge()
            assert not torch.equal(layer.weight, before)
            with fastlora.use_backend(second):
                layer.unmerge()
            assert same(layer.weight.detach(), before)


@needs_native
@pytest.mark.parametrize(
    ("name", "unused"), [("native", reference_merge), ("reference", native_merge)]
)
def test_use_backend_says_who_merges(name, unused, monkeypatch):
    for function in ("add_low_rank", "encode_correction", "decode_correction", "checksum"):
        monkeypatch.delattr(unused, function)
    layer = fastlora.Linear(8, 6, r=2, init_lora_weights=False)
    with fastlora.use_backend(name):
        layer.merge()
        layer.unmerge()


# ---- instruction sets ---------------------------------------------------------------------------


def digest():
    """Of what merging makes of some weights, where all sums are exact."""
    # without randn, which differs between instruction sets
    found = hashlib.sha256()
    torch.manual_seed(0)
    for dtype, (n, k) in itertools.product(DTYPES, [(3, 5), (40, 131)]):
        for weight in (any_bits((n, k), dtype), (torch.rand(n, k) - 0.5).to(dtype)):
            left, right = (torch.randint(-9, 9, size).float() for size in [(n, 5), (5, k)])
            term = Term(weight, left * 2**-10, right)
            record = merged([term], 0.3)
            found.update(weight.nan_to_num(nan=0.5).view(torch.uint8).numpy())
            for correction in (entry.correction for entry in record._entries):
                for t in (correction.codes, correction.escaped, correction.values):
                    found.update(t.view(torch.uint8).numpy())
    return found.hexdigest()


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets_merge_alike(capability):
    source = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    source += "import test_merge_backends as t; print(t.digest())"
    result = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with fastlora.use_backend("reference"):
        assert digest() == result.stdout.strip()
    assert digest() == result.stdout.strip()
