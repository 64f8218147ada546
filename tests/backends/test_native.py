"""The C++ and CUDA stages against the reference, and their operators inside PyTorch.

Where there is no GPU, the CUDA kernels run on an emulated device.
"""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastlora import backends, dropout, testing
from fastlora.backends import native, reference
from fastlora.blocks import Blocks

built = pytest.mark.skipif(bool(native.why_not()), reason=f"native: {native.why_not()}")

# of X, of the factors
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16 under fp32": (torch.bfloat16, torch.float32),
    "fp16 under fp32": (torch.float16, torch.float32),
    "fp64": (torch.float64, None),
}
THIRDS = Blocks((84, 84, 84), (True, False, True))
UNEVEN = Blocks((126, 63, 63), (True, True, True))
BY_HEAD = Blocks((96, 48, 48), (True, False, True), 3)
each_dtype = pytest.mark.parametrize("dtypes", DTYPES)


@pytest.fixture(params=[pytest.param("cpu", marks=built), "cuda"])
def stages(request):
    """The backend with the kernels for tensors on this type of device."""
    if request.param == "cpu":
        return native
    if getattr(request.node, "callspec", None) and "fp64" in request.node.callspec.params.values():
        pytest.skip("there are no CUDA kernels for fp64")
    return request.getfixturevalue("emulated")


@dataclass
class Operands:
    """What the stages take: sizes as in ``docs/math.md``; c is ``scaling / (1 - p)``."""

    X: torch.Tensor
    W: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    S: torch.Tensor
    dY: torch.Tensor
    dS: torch.Tensor
    blocks: Blocks
    t: int = 0
    c: float = 0.5

    def map(self, function):
        """With ``function`` applied to every tensor, by name."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return Operands(
            **{**vars(self), **{name: function(name, t) for name, t in tensors.items()}}
        )

    @property
    def seed(self):
        return torch.tensor([77])

    @property
    def mask(self):
        return dropout.draw_mask(self.seed, *self.X.shape, self.t) if self.t else None


def tensors(i):
    return {name: t for name, t in vars(i).items() if isinstance(t, torch.Tensor)}


def operands(M, K, r, dtypes, blocks, draw, bias=True, **options):
    """Operands of these sizes; ``draw`` makes a tensor of a shape."""
    dtype, factor_dtype = DTYPES[dtypes]
    wide = reference.accumulation_dtype(dtype)
    of, N, R = factor_dtype or dtype, blocks.out_features, blocks.count * r
    return Operands(
        X=draw(M, K).to(dtype),
        W=draw(N, K).to(dtype),
        bias=draw(N).to(dtype) if bias else None,
        A=draw(R, K).to(of),
        B=draw(blocks.adapted_features, r).to(of),
        S=draw(M, R).to(wide),
        dY=draw(M, N).to(dtype),
        dS=draw(M, R).to(wide),
        blocks=blocks,
        **options,
    )


def run(stages, i):
    """The results of every stage, each on its own operands."""
    S, mask = stages.shrink(i.X, i.A, i.c, i.t, i.seed if i.t else None)
    dS, dB = stages.grad_expand(i.dY, i.S, i.B, i.c, i.blocks, True, True)
    return {
        "S": S,
        **({"mask": mask} if i.t else {}),
        "Y": stages.expand(i.X, i.W, i.bias, i.S, i.B, i.blocks),
        "dS": dS,
        "dB": dB,
        "dA": stages.grad_shrink(i.dS, i.X, i.mask, i.A),
        "dX": stages.grad_input(i.dY, i.W, i.dS, i.A, i.mask),
        "delta": stages.delta(i.A, i.B, i.c, i.blocks),
    }


def signs(seed=0):
    """Draws -1, 0 and 1: sums of these are exact in any order, and in 16 bits too."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(-1, 2, shape, generator=generator)


def normals(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def assert_exact(stages, i):
    """Every stage gives what the reference gives in fp64, in the dtype it has there."""
    got = run(stages, i)
    exact = run(reference, i.map(lambda name, t: t.double().resolve_neg()))
    dtypes = {"mask": torch.uint8, "S": i.S.dtype, "dS": i.S.dtype, "Y": i.X.dtype, "dX": i.X.dtype}
    for name, t in exact.items():
        assert got[name].dtype == dtypes.get(name, i.A.dtype), name
        assert torch.equal(got[name], t.to(got[name].dtype)), name


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- masks


@pytest.mark.parametrize("t", [1, 6554, 32768, 65535, 65536])
def test_masks_of_every_width(t, stages):
    for K in range(1, 301):
        _, mask = stages.shrink(torch.zeros(3, K), torch.zeros(1, K), 1.0, t, torch.tensor([5]))
        assert torch.equal(mask, dropout.draw_mask(torch.tensor([5]), 3, K, t)), K


@pytest.mark.parametrize("seed", [0, -1, 2**32 + 5, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("M", [0, 1, 31, 32, 33, 70])
def test_masks_of_any_height_and_seed(M, seed, stages):
    for dtype in stages.dtypes["cpu"]:
        X, seeds = torch.zeros(M, 45, dtype=dtype), torch.tensor([seed])
        _, mask = stages.shrink(X, X.new_zeros(1, 45), 1.0, 32768, seeds)
        assert torch.equal(mask, dropout.draw_mask(seeds, M, 45, 32768))


# ---- values


@pytest.mark.parametrize("M", [0, 1, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("r", [1, 3, 8, 16, 33, 64, 100, 256])
@each_dtype
def test_exact_sums(M, r, dtypes, stages):
    K, blocks = {1: 1, 3: 7, 8: 33, 100: 300}.get(r, 129), {8: THIRDS, 33: BY_HEAD, 64: UNEVEN}
    blocks = blocks.get(r, Blocks.single(37 * r % 131))
    assert_exact(stages, operands(M, K, r, dtypes, blocks, signs(), bias=r != 3, t=6554 * (r % 3)))


def composition(i):
    """Each stage in plain PyTorch, the base product apart, sums in the accumulation dtype."""
    wide, r = i.S.dtype, i.B.shape[1]
    kept = i.X.to(wide)
    if i.t:
        kept = kept * dropout.unpack_mask(i.mask, i.X.shape[1])
    A, B, dY = i.A.to(wide), i.B.to(wide), i.dY.to(wide)
    Y, dS = F.linear(i.X, i.W, i.bias).to(wide), torch.empty_like(i.dS)
    dB, delta = torch.empty_like(B), A.new_zeros(i.blocks.out_features, A.shape[1])
    for g, (A_g, B_g) in enumerate(i.blocks.factors(A, B)):
        of_g, rows = slice(g * r, (g + 1) * r), i.blocks.rows_of_B(g)
        Y_g, dY_g = (i.blocks.output(t, g) for t in (Y, dY))
        Y_g += (i.S[:, of_g] @ B_g.t()).view(Y_g.shape)
        dS[:, of_g] = i.c * (dY_g.flatten(1) @ B_g)
        dB[rows] = dY_g.flatten(1).t() @ i.S[:, of_g]
        delta_g = i.blocks.output(delta.t(), g)
        delta_g += (i.c * (B_g @ A_g)).t().view(delta_g.shape)
    through_factors = i.dS @ A
    if i.t:
        through_factors = through_factors * dropout.unpack_mask(i.mask, i.X.shape[1])
    return {
        "S": i.c * (kept @ A.t()),
        "Y": Y.to(i.X.dtype),
        "dS": dS,
        "dB": dB.to(i.B.dtype),
        "dA": (i.dS.t() @ kept).to(i.A.dtype),
        "dX": ((i.dY @ i.W).to(wide) + through_factors).to(i.X.dtype),
        "delta": delta.to(i.B.dtype),
    }


# M, K, r, blocks, t
CASES = [
    (1, 252, 8, Blocks.single(192), 6554),
    (5, 300, 1, Blocks.single(192), 0),
    (31, 100, 3, THIRDS, 6554),
    (32, 64, 16, UNEVEN, 0),
    (33, 129, 33, BY_HEAD, 6554),
    (100, 128, 64, THIRDS, 0),
    (33, 300, 100, Blocks.single(507), 32768),
    (100, 252, 256, Blocks.single(252), 6554),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:3])))
@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name != "fp64"])
def test_no_less_accurate_than_the_composition(case, dtypes, stages):
    """By the rule of ``fastlora.testing``, stage by stage; small shapes are judged together."""
    M, K, r, blocks, t = case
    results = [], [], []
    for seed in range(max(1, min(64, (1 << 13) // (M * r)))):
        i = operands(M, K, r, dtypes, blocks, normals(seed), t=t)
        got = run(stages, i)
        got.pop("mask", None)
        exact = composition(i.map(lambda name, t: t.double()))
        for result, of in zip(results, (got, composition(i), exact), strict=True):
            result.append(of)
    stacked = ({name: torch.stack([d[name] for d in r]) for name in r[0]} for r in results)
    testing.assert_no_worse(*stacked)


# ---- layouts in memory


def moat(rows, cols, like):
    return torch.full((rows, cols), torch.nan, dtype=like.dtype)


def sliced(t):
    t_like = moat(2 * t.shape[0] + 1, 3 * t.shape[1] + 2, t)[1::2, 2::3]
    return t_like.copy_(t)


def offset(t):
    rows, cols = t.shape
    return moat(rows + 2, cols + 4, t)[1 : rows + 1, 3 : cols + 3].copy_(t)


# the values of a matrix, or some of them repeated; what lies between them in memory is NaN
VIEWS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": sliced,
    "transposed slices": lambda t: sliced(t.t()).t(),
    "offset": offset,
    "equal rows": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "equal columns": lambda t: t[:, :1].expand(t.shape),
    "one number": lambda t: t[:1, :1].expand(t.shape) if len(t) else t,
    "negated": lambda t: torch._neg_view(t.neg()),
}
# what the stages make themselves is contiguous
CONTIGUOUS = ("S", "dS")


def seen_as(i, views):
    """The operands in these layouts, by name."""

    def view(name, t):
        kind = VIEWS[views.get(name, "contiguous")]
        return kind(t) if t.dim() == 2 else kind(t.unsqueeze(0)).squeeze(0)

    return i.map(view)


def memory(i):
    """All that the operands lie in, whether they show it or not."""
    whole = i.map(lambda name, t: t.new_empty(0, dtype=torch.uint8).set_(t.untyped_storage()))
    return {name: t.clone() for name, t in tensors(whole).items()}


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "contiguous"])
@pytest.mark.parametrize("name", ["X", "W", "bias", "A", "B", "dY"])
@each_dtype
def test_any_strides(name, view, dtypes, stages):
    for M, K, r, blocks in ((33, 131, 3, BY_HEAD), (2, 64, 16, UNEVEN)):
        i = seen_as(operands(M, K, r, dtypes, blocks, signs(), t=6554), {name: view})
        before = memory(i)
        assert_exact(stages, i)
        assert all(torch.equal(t, before[name]) for name, t in memory(i).items())


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_sums_of_another_layout_are_refused(name, stages):
    i = operands(5, 7, 3, "fp32", Blocks.single(9), signs())
    for view in ("transposed", "sliced", "equal rows", "equal columns"):
        with pytest.raises(ValueError, match=f"{name}: got Float with strides"):
            run(stages, seen_as(i, {name: view}))


@contextmanager
def new_memory_holds_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


blocks_of_any_size = st.builds(
    lambda sizes, interleave: Blocks(
        tuple(n * interleave for n, _ in sizes), tuple(on for _, on in sizes), interleave
    ),
    st.lists(st.tuples(st.integers(1, 70), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 3),
)


anything = st.fixed_dictionaries(
    {
        "M": st.integers(0, 80),
        "K": st.integers(1, 280),
        "r": st.integers(1, 140),
        "dtypes": st.sampled_from(list(DTYPES)),
        "blocks": blocks_of_any_size,
        "t": st.sampled_from([0, 1, 6554, 32768, 65536]),
        "bias": st.booleans(),
    }
)
in_any_layout = st.fixed_dictionaries(
    dict.fromkeys(("X", "W", "bias", "A", "B", "dY"), st.sampled_from(list(VIEWS)))
)


def test_anything_goes(stages):
    """Shapes, blocks, dtypes and strides at random; every element of a result is written."""

    # the emulated device is slow
    @settings(
        max_examples=600 if stages is native else 200,
        derandomize=True,
        deadline=None,
        database=None,
    )
    @given(sizes=anything, views=in_any_layout)
    def check(sizes, views):
        assume(DTYPES[sizes["dtypes"]][0] in stages.dtypes["cpu"])
        i = seen_as(operands(**sizes, draw=signs()), views)
        with new_memory_holds_nan():
            assert_exact(stages, i)

    check()


# ---- NaN and Inf

# where the CUDA kernels multiply infinity with all parts of a split number, which may give infinity
# less infinity
SPLIT = {
    "bf16": ("B", "dY"),
    "fp16": ("B", "dY"),
    "bf16 under fp32": ("B", "dY", "S"),
}


@pytest.mark.parametrize("t", [0, 32768])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["X", "W", "bias", "A", "B", "S", "dY", "dS"])
@each_dtype
def test_nan_and_inf_go_where_the_reference_puts_them(name, value, t, dtypes, stages):
    i = operands(35, 37, 3, dtypes, Blocks((16, 8), (True, False)), signs(), t=t)
    planted = getattr(i, name)
    for index in ((0, 1), (1, 0), (-1, -1)):
        planted[index[: planted.dim()]] = value
    got, expected = run(stages, i), run(reference, i)
    assert not all(t.isfinite().all() for t in expected.values())
    if stages is not native and name in SPLIT.get(dtypes, ()):
        got, expected = ({of: t.isfinite().int() for of, t in r.items()} for r in (got, expected))
    for result, e in expected.items():
        assert torch.equal(got[result].nan_to_num(7, 8, 9), e.nan_to_num(7, 8, 9)), result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_pytorchs(dtype, stages):
    """Of every number of 16 bits times some: ties, denormals, overflow, NaN."""
    A = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(0)
    others = [1.0, 1.0 + torch.finfo(dtype).eps, -3.0, 1 / 3, 1e-3, 2.0**-14, 1e4]
    B = torch.tensor(others, dtype=dtype).unsqueeze(1)
    got = stages.delta(A, B, 1.0, Blocks.single(len(B)))
    expected = (B.float() * A.float() + 0.0).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


# ---- the two passes are the stages


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@each_dtype
def test_passes_are_their_stages(dtypes, needs, stages):
    i, needs = operands(33, 131, 3, dtypes, BY_HEAD, normals(), t=6554), [bool(n) for n in needs]
    with threads(1):
        Y, S, mask = stages.forward(i.X, i.W, i.bias, i.A, i.B, i.c, i.t, i.seed, i.blocks)
        passes = stages.backward(i.dY, i.X, i.W, i.A, i.B, S, mask, i.c, i.blocks, *needs)
        expected_S, expected_mask = stages.shrink(i.X, i.A, i.c, i.t, i.seed)
        dS, dB = stages.grad_expand(i.dY, S, i.B, i.c, i.blocks, True, True)
        expected_passes = (
            stages.grad_input(i.dY, i.W, dS, i.A, mask),
            stages.grad_shrink(dS, i.X, mask, i.A),
            dB,
        )
        assert torch.equal(Y, stages.expand(i.X, i.W, i.bias, S, i.B, i.blocks))
    assert torch.equal(S, expected_S) and torch.equal(mask, expected_mask)
    for got, expected, need in zip(passes, expected_passes, needs, strict=True):
        assert torch.equal(got, expected) if need else got is None


def test_c_may_be_a_tensor(stages):
    i = operands(5, 7, 3, "fp32", Blocks.single(9), signs())
    expected = run(stages, i)
    for c in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)):
        i.c = c
        assert all(torch.equal(t, expected[name]) for name, t in run(stages, i).items())


# ---- threads


@built
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16 under fp32", "fp64"])
def test_any_number_of_threads(n, dtypes):
    for M in (17, 100):
        with threads(n):
            assert_exact(native, operands(M, 300, 8, dtypes, UNEVEN, signs(), t=6554))


@pytest.mark.parametrize("n", [1, 2])
@each_dtype
def test_repeats_bit_for_bit(n, dtypes, stages):
    i = operands(100, 300, 24, dtypes, UNEVEN, normals(), t=6554)
    with threads(n):
        first = run(stages, i)
        for _ in range(5):
            assert all(torch.equal(t, first[name]) for name, t in run(stages, i).items())


# ---- every instruction set

SCRIPT = """
import sys

import torch

import fastlora
from fastlora import backends, dropout, testing
from fastlora.backends import native

assert native._C.build_info()["instruction_set"] == sys.argv[1]
assert sys.argv[1] in native.description()
seed = torch.tensor([-5])
for K in (1, 31, 32, 100, 300):
    for t in (1, 32768, 65536):
        _, mask = native.shrink(torch.zeros(9, K), torch.zeros(1, K), 1.0, t, seed)
        assert torch.equal(mask, dropout.draw_mask(seed, 9, K, t)), (K, t)
blocks = fastlora.blocks.Blocks((96, 48, 48), (True, False, True), 3)
cases = ((128, 252, 507, 8, None), (129, 100, 192, 33, blocks), (40, 131, 80, 65, None))
for case, p in zip(cases, (0.0, 0.1, 0.5)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for factor_dtype in {dtype, torch.float32}:
            options = {"p": p, "dtype": dtype, "factor_dtype": factor_dtype, "blocks": case[4]}
            testing.check_linear(*case[:4], backend="native", **options)
native._C.set_base_products("own")
torch.set_num_threads(1)
for case in cases[:2]:
    testing.check_linear(*case[:4], backend="native", p=0.1, blocks=case[4])
print("right")
"""
# what ATEN_CPU_CAPABILITY is set to, and the build that then runs
CAPABILITIES = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
FULL = torch.backends.cpu.get_cpu_capability().lower()


@built
def test_the_widest_build_is_what_runs_above():
    assert native._C.build_info()["instruction_set"] == CAPABILITIES.get(FULL, "baseline")


@built
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_other_instruction_sets(capability):
    """By the variable with which PyTorch, too, is held to less than the machine has."""
    if list(CAPABILITIES).index(capability) >= [*CAPABILITIES, FULL].index(FULL):
        pytest.skip(f"{capability}: this machine has no more than {FULL}")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", SCRIPT, CAPABILITIES[capability]]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "right\n"


@built
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_nothing_of_torch_is_asked_for_that_may_be_missing():
    """A weak symbol is null, without a word, where no library that is linked offers it."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", native._C.__file__], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    symbols = [line.split() for line in listed.stdout.splitlines()]
    assert any(kind == "U" and "_ZN2at" in name for kind, name in symbols)
    # but what compilers ask for on their own account
    weak = [name for kind, name in symbols if kind in "wv"]
    assert [name for name in weak if not name.startswith("_") or name.startswith("_Z")] == []


# ---- CUDA


@pytest.mark.skipif(os.environ.get("FASTLORA_CUDA") != "1", reason="only where FASTLORA_CUDA=1")
def test_the_cuda_kernels_are_built():
    assert native._C.build_info()["cuda"]


@pytest.mark.skipif("cuda" not in native.dtypes, reason="built without CUDA kernels")
def test_the_cuda_kernels_are_there_and_say_what_is_missing():
    for name in (*PASSES, *STAGES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CUDA"), name
    assert native._C.build_info()["cuda"]["architectures"] in native.description()
    obstacle = native.cuda_obstacle()
    assert backends.available("cuda")["native"] == obstacle
    if torch.cuda.is_available():
        assert obstacle is None
    else:
        assert "driver" in obstacle or "device" in obstacle


# ---- the operators


def arguments(dtypes="fp32", M=5, t=6554):
    """Arguments of every operator, by their names."""
    i = operands(M, 12, 3, dtypes, Blocks((6, 4, 2), (True, False, True), 2), signs(), t=t)
    return {
        **tensors(i),
        "mask": i.mask,
        "c": 0.5,
        "scaling": 0.5,
        "scale": None,
        "t": t,
        "seed": i.seed,
        "splits": [6, 4, 2],
        "enabled": [True, False, True],
        "interleave": 2,
        **dict.fromkeys(("need_dX", "need_dA", "need_dB", "need_dS"), True),
    }


PASSES = ("forward", "backward", "multi_forward", "multi_backward")
STAGES = ("shrink", "expand", "grad_expand", "grad_shrink", "grad_input", "delta")
each_operator = pytest.mark.parametrize("name", [*PASSES[:2], *STAGES])


def takes(name, stages):
    """The operator, and the names of its arguments."""
    namespace = torch.ops.fastlora if stages is native else torch.ops.fastlora_emulated
    operator = getattr(namespace, name).default
    return operator, [argument.name for argument in operator._schema.arguments]


@each_operator
@pytest.mark.parametrize(
    ("dtypes", "t", "changed"),
    [
        ("fp32", 6554, {}),
        ("bf16 under fp32", 0, {"scale": torch.tensor(0.5), "bias": None}),
        ("fp64", 6554, {"need_dX": False, "need_dS": False, "mask": None}),
        ("fp16", 0, {"need_dA": False, "need_dB": False, "S": None}),
    ],
)
def test_opcheck(name, dtypes, t, changed, stages):
    operator, names = takes(name, stages)
    if name == "expand":
        changed = {key: value for key, value in changed.items() if key != "S"}
    given = arguments(dtypes, t=t) | changed
    torch.library.opcheck(operator, tuple(given[argument] for argument in names))


WRONG_TENSORS = {
    "one dimension": lambda t: t[0],
    "three dimensions": lambda t: t.unsqueeze(-1).expand(*t.shape, 40),
    "taller": lambda t: t.repeat(2, *(t.dim() - 1) * [1]),
    "wider": lambda t: t.repeat(*(t.dim() - 1) * [1], 2),
    "integers": lambda t: t.to(torch.int32),
    "wide": lambda t: t.to(torch.float64),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
}
WRONG_SUMS = {
    "of 16 bits": lambda t: t.half(),
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape),
}
WRONG_OTHERS = {
    "splits": [[], [6, 4], [6, 4, 4], [6, 5, 1], [6, 0, 6], [14, -4, 2], [2**62] * 4],
    "enabled": [[], [True] * 3, [True] * 4],
    "interleave": [0, -2, 4, 2**62],
    "t": [-1, 65537, 2**40],
    "seed": [None, torch.tensor([1, 2]), torch.tensor([0.5]), torch.tensor([], dtype=torch.int64)],
    "scale": [torch.tensor([1.0, 2.0])],
    "mask": [torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.bool)],
    **{name: [None] for name in ("X", "W", "A", "S")},
}
# more rows, of which there may be any number, and ranks and columns that no other operand has
RIGHT = {
    ("forward", "X", "taller"),
    ("shrink", "X", "taller"),
    ("shrink", "A", "taller"),
    ("delta", "A", "wider"),
}


def wrong_values(of):
    """Values that no operator takes for this argument, by what is wrong with them."""
    yield from ((repr(value), value) for value in WRONG_OTHERS.get(of, []))
    tensor = arguments()[of]
    if isinstance(tensor, torch.Tensor) and of != "seed":
        kinds = WRONG_TENSORS | (WRONG_SUMS if of in (*CONTIGUOUS, "mask") else {})
        yield from ((kind, change(tensor)) for kind, change in kinds.items())


@each_operator
def test_operators_refuse_what_does_not_fit(name, stages):
    """Whatever a caller gives them: memory beyond an operand is never touched."""
    operator, names = takes(name, stages)
    accepted = []
    for changed in names:
        for kind, value in wrong_values(changed):
            given = arguments() | {changed: value}
            try:
                operator(*(given[argument] for argument in names))
            except (ValueError, TypeError, RuntimeError, IndexError):
                continue
            if (name, changed, kind) not in RIGHT:
                accepted.append((changed, kind))
    assert not accepted, accepted


@pytest.mark.parametrize("name", ["reference", "triton", "emulated"])
def test_nothing_is_added_for_an_output_of_no_features(name, usable):
    """ATen would read and write all of dX on a GPU, to add a product of nothing to it."""
    i = operands(5, 16, 3, "bf16", Blocks.single(24), signs(), t=6554)
    backend, mask = backends.select(usable(name)), i.mask
    with torch.profiler.profile() as profile:
        dX = backend.grad_input(i.dY[:, :0], i.W[:0], i.dS, i.A, mask)
    assert torch.equal(dX, dropout.keep(i.dS @ i.A.float(), mask).bfloat16())
    seen = {event.key for event in profile.key_averages()}
    assert seen and not seen & {"aten::addmm_", "aten::add_", "aten::mul"}


# ---- the operators of layers that share X


def of_layers(name, stages, dtypes="fp32", **changed):
    """The operator, and its arguments by their names: of a layer, and of one without factors."""
    operator, names = takes(name, stages)
    one = operands(5, 12, 3, dtypes, Blocks.single(8), signs(), t=6554)
    lists = {
        **{key: [t, t] for key, t in tensors(one).items() if key != "X"},
        "A": [one.A, one.A[:0]],
        "B": [one.B, one.B[:, :0]],
        "S": [one.S, None],
        "mask": [one.mask, None],
        "bias": [one.bias, None],
        "c": [0.5, 0.5],
        "scale": [None, torch.tensor(2.0)],
        "t": [6554, 0],
        "seed": [one.seed, None],
        "need_dA": [True, False],
        "need_dB": [True, False],
    }
    given = {"X": one.X, **lists, "need_dX": True, **changed}
    return operator, {key: given[key] for key in names}


each_pass_of_layers = pytest.mark.parametrize("name", ["multi_forward", "multi_backward"])


@each_pass_of_layers
@pytest.mark.parametrize(
    ("dtypes", "changed"),
    [
        ("fp32", {}),
        ("fp64", {"scale": [torch.tensor(0.5), None], "need_dX": False}),
        ("bf16 under fp32", {"need_dA": [False, False], "mask": [None, None], "X": None}),
        ("fp16", {"need_dB": [False, True], "S": [None, None], "t": [0, 0]}),
    ],
)
def test_opcheck_of_layers(name, dtypes, changed, stages):
    changed = {key: of for key, of in changed.items() if name == "multi_backward" or of is not None}
    operator, given = of_layers(name, stages, dtypes, **changed)
    torch.library.opcheck(operator, tuple(given.values()))


@each_pass_of_layers
def test_operators_of_layers_refuse_what_does_not_fit(name, stages):
    operator, given = of_layers(name, stages)
    accepted = []

    def attempt(changed, kind, value):
        try:
            operator(*(given | {changed: value}).values())
        except (ValueError, TypeError, RuntimeError, IndexError):
            return
        accepted.append((changed, kind))

    for changed, of in given.items():
        if isinstance(of, list):
            for count in (0, 1, 3):
                attempt(changed, f"{count} elements", (2 * of)[:count])
        first = of[0] if isinstance(of, list) else of
        if isinstance(first, torch.Tensor) and changed != "seed":
            kinds = WRONG_TENSORS | (WRONG_SUMS if changed in ("S", "mask") else {})
            for kind, change in kinds.items():
                wrong = change(first)
                attempt(changed, kind, [wrong, of[1]] if isinstance(of, list) else wrong)
        if changed in ("X", "W", "A", "S", "seed"):
            attempt(changed, "none", [None, of[1]] if isinstance(of, list) else None)
    # any number of rows of X makes as many of Y
    expected = [("X", "taller")] if name == "multi_forward" else []
    assert accepted == expected


OVERFLOWS = """
import torch

import fastlora

some, none, blocks = torch.zeros(8, 4), torch.zeros(0, 2), ([2**62] * 4, [True] * 4, 1)
operators = torch.ops.fastlora
for call in (
    lambda: operators.expand(some, torch.zeros(0, 4), None, torch.zeros(8, 8), none, *blocks),
    lambda: operators.grad_expand(torch.zeros(8, 0), None, none, 1.0, None, *blocks, True, False),
    lambda: operators.delta(some, none, 1.0, None, *blocks),
):
    try:
        call()
        print("accepted")
    except ValueError:
        print("refused")
"""


@built
def test_operators_refuse_sizes_whose_sum_overflows():
    """To nothing, here, which is what the other operands have."""
    result = subprocess.run([sys.executable, "-c", OVERFLOWS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == 3 * ["refused"]
