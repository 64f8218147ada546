"""What only a GPU shows: real sizes, big offsets, graphs, streams, compilers, memory checkers."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import backends, dropout, testing
from fastlora.blocks import Blocks

AVAILABLE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE, reason="there is no CUDA device"),
]
WHY_NOT = backends.available("cuda")
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name, reason in WHY_NOT.items()
    ],
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QV = (True, False, True)
DTYPES = {
    "bf16": (BF16, None),
    "fp16": (FP16, None),
    "fp32": (FP32, None),
    "bf16 under fp32": (BF16, FP32),
    "fp16 under fp32": (FP16, FP32),
}
# M, K, N, r, blocks: of real models, and none of whose sizes is a multiple of anything
SIZES = {
    "square": (2048, 2048, 2048, 16, None),
    "wide, rank 64": (1024, 1024, 4096, 64, None),
    # of 132 multiprocessors, nearly all in the last wave of the fused products, too
    "filling": (4096, 1024, 4096, 16, None),
    "qkv": (2048, 1024, 3072, 8, Blocks((1024,) * 3, QV)),
    "gqa": (777, 2048, 3072, 16, Blocks((2048, 512, 512), (True, True, True))),
    "by head": (1024, 512, 1536, 8, Blocks((512,) * 3, QV, 8)),
    "ragged": (1531, 1109, 1693, 33, None),
    "decoding": (1, 4096, 4096, 16, None),
    "rank 256": (512, 1024, 1024, 256, None),
}


def draw(*shape, dtype=BF16, std=1.0):
    return (torch.randn(*shape, device="cuda") * std).to(dtype)


def layer(kind="linear", dtype=BF16, p=0.1, K=512, N=768, r=16):
    torch.manual_seed(0)
    options = {"r": r, "lora_alpha": 32, "lora_dropout": p, "device": "cuda", "dtype": dtype}
    if kind == "merged":
        made = fastlora.MergedLinear(K, N, enable_lora=list(QV), **options)
    else:
        made = fastlora.Linear(K, N, **options)
    torch.nn.init.normal_(made.lora_B, std=0.1)
    return made


def step(made, x, grad):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    y = made(x)
    return (y.detach(), *torch.autograd.grad(y, [x, made.lora_A, made.lora_B], grad))


def same_bits(one, other):
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


# ---- there


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_the_kernels_are_built():
    """What was not built would be skipped below, and nobody would know."""
    assert WHY_NOT["native"] is None
    if torch.cuda.get_device_capability() == (9, 0) and find_spec("cutlass_library"):
        assert WHY_NOT["cutlass"] is None


# ---- right


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_no_less_accurate_than_the_composition(sizes, dtypes, p, backend):
    M, K, N, r, blocks = SIZES[sizes]
    dtype, factor_dtype = DTYPES[dtypes]
    testing.check_linear(
        *(M, K, N, r),
        p=p,
        blocks=blocks,
        dtype=dtype,
        factor_dtype=factor_dtype,
        device="cuda",
        backend=backend,
    )


# M, K, N, r at the edges of tiles of 128 x 256 x 64, two under each other, and of what is copied at
# once; the last have more tiles than there are multiprocessors
EDGES = [
    *[(M, 72, 264, 4) for M in (1, 127, 128, 129, 255, 256, 257, 385)],
    *[(300, K, 136, 9) for K in (8, 56, 64, 72, 248, 256, 264, 520)],
    *[(300, 200, N, 9) for N in (8, 56, 64, 72, 248, 256, 264, 520)],
    *[(300, 320, 192, r) for r in (1, 31, 32, 33, 64, 65, 128, 200)],
    (4104, 1048, 4360, 16),
    (8200, 4104, 72, 40),
]


@pytest.mark.skipif(bool(WHY_NOT["cutlass"]), reason=f"cutlass: {WHY_NOT['cutlass']}")
@pytest.mark.parametrize("t", [0, 6554, 65536])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "bf16 under fp32"])
@pytest.mark.parametrize("sizes", EDGES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_fused_products_are_exact(sizes, dtypes, t):
    """Of integers, whose sums are, and rounded once; whatever is beyond the operands."""
    M, K, N, r = sizes
    dtype, factor_dtype = DTYPES[dtypes]

    def signs(*shape, dtype=dtype):
        # in memory that goes on with what would be seen in any sum
        wide = torch.full((shape[0] + 8, shape[-1] + 8), torch.nan, device="cuda", dtype=dtype)
        drawn = wide[:-8, :-8] if len(shape) == 2 else wide[0, :-8]
        return drawn.copy_(torch.randint(-1, 2, shape, device="cuda"))

    X, W, dY, bias = signs(M, K), signs(N, K), signs(M, N), signs(N)
    A, B = signs(r, K, dtype=factor_dtype or dtype), signs(N, r, dtype=factor_dtype or dtype)
    # more than 16 bits hold
    S, dS = (torch.randint(-3000, 3001, (M, r), device="cuda").float() for _ in range(2))
    mask = dropout.draw_mask(torch.tensor([5], device="cuda"), M, K, t) if t else None
    stages = backends.select("cutlass", "cuda", dtype)
    through_factors = dS.double() @ A.double()
    if t:
        through_factors *= dropout.unpack_mask(mask, K)
    exact = {
        "Y": X.double() @ W.double().t() + S.double() @ B.double().t() + bias.double(),
        "dX": dY.double() @ W.double() + through_factors,
    }
    for _ in range(2):
        got = {
            "Y": stages.expand(X, W, bias, S, B, Blocks.single(N)),
            "dX": stages.grad_input(dY, W, dS, A, mask),
        }
        for name, expected in exact.items():
            assert torch.equal(got[name], expected.to(dtype)), name


@each_backend
def test_tf32_follows_torch(backend, monkeypatch):
    """Allowed, products of float32 round their operands; else they do not."""
    inputs = testing.make_inputs(512, 1024, 1024, 16, device="cuda")
    exact = testing.truth(inputs)["y"]
    errors = {}
    for setting in ("highest", "high"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        try:
            y = testing.fused(inputs, backend)["y"]
        finally:
            torch.set_float32_matmul_precision(before)
        errors[setting] = (y.double() - exact).square().mean().sqrt().item()
    assert errors["highest"] < 1e-5 < errors["high"] < 1e-2


@each_backend
@pytest.mark.parametrize("kind", ["linear", "merged"])
def test_two_runs_give_the_same_bits(kind, backend):
    made = layer(kind, K=1024, N=3072)
    x, grad = draw(4096, 1024), draw(4096, 3072)
    runs = []
    with fastlora.use_backend(backend):
        for _ in range(3):
            torch.manual_seed(1)
            runs.append(step(made, x, grad))
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


@each_backend
def test_the_mask_is_that_of_the_cpu(backend):
    seed = 2**40 + 7
    made = layer(p=0.3)
    x = torch.ones(100, 512, device="cuda", dtype=BF16, requires_grad=True)
    with torch.no_grad():
        made.weight.zero_()
        made.lora_A.fill_(1)
        made.lora_B.fill_(1)
    y = fastlora.functional.lora_linear(
        x,
        made.weight,
        made.lora_A,
        made.lora_B,
        scaling=1.0,
        p=0.3,
        seed=torch.tensor([seed], device="cuda"),
        backend=backend,
    )
    y.sum().backward()
    mask = dropout.draw_mask(torch.tensor([seed]), 100, 512, dropout.threshold(0.3))
    assert torch.equal((x.grad != 0).cpu(), dropout.unpack_mask(mask, 512))


@each_backend
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_merging_gives_the_bits_of_the_cpu(dtype, backend):
    made = layer("merged", dtype=dtype)
    # powers of two: the sum over ranks is exact in any order
    with torch.no_grad():
        for factor in (made.lora_A, made.lora_B):
            factor.copy_(torch.randint(-2, 3, factor.shape).to(dtype) * 2.0**-6)
    host = fastlora.MergedLinear(512, 768, r=16, lora_alpha=32, enable_lora=list(QV), dtype=dtype)
    host.load_state_dict(made.state_dict())
    before = made.weight.detach().clone()
    with fastlora.use_backend(backend):
        made.merge()
    with fastlora.use_backend("reference"):
        host.merge()
    assert same_bits([made.weight.cpu()], [host.weight])
    with fastlora.use_backend(backend):
        made.unmerge()
    assert same_bits([made.weight], [before])


# ---- big


@pytest.fixture
def much_memory(workers_folder):
    """For one test at a time."""
    import fcntl  # which not every system has

    with (workers_folder / "much_memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 24 * 2**30:
            pytest.skip("needs 24 GiB of free memory")
        yield
        torch.cuda.empty_cache()


@each_backend
def test_inputs_of_more_elements_than_32_bits_count(backend, much_memory):
    """Rows beyond 2**31 elements: outputs, masks and gradients as of these rows alone."""
    M, K, N, r = 2**18 + 3, 2**13 + 64, 64, 4
    assert M * K > 2**31
    x = torch.empty(M, K, device="cuda", dtype=BF16).normal_()
    W, A, B = draw(N, K, std=K**-0.5), draw(r, K, std=K**-0.5), draw(N, r)
    seed, t = torch.tensor([3], device="cuda"), dropout.threshold(0.5)
    chosen = backends.select(backend, "cuda", BF16)
    last = slice(M - 40, M)
    S, mask = chosen.shrink(x, A, 2.0, t, seed)
    drawn = dropout.draw_mask(seed, 40, K, t, M - 40)
    assert torch.equal(mask[last], drawn)
    kept = x[last].float() * dropout.unpack_mask(drawn, K)
    torch.testing.assert_close(S[last], 2 * kept @ A.float().t(), rtol=1e-2, atol=1e-2)
    dY = draw(M, N)
    dS, _ = chosen.grad_expand(dY, S, B, 2.0, Blocks.single(N), True, True)
    dX = chosen.grad_input(dY, W, dS, A, mask)
    expected = dY[last].float() @ W.float()
    expected += dS[last] @ A.float() * dropout.unpack_mask(drawn, K)
    torch.testing.assert_close(dX[last].float(), expected, rtol=2e-2, atol=2e-2)
    dA = chosen.grad_shrink(dS, x, mask, A)
    # the rows one after the other, in few parts
    sums = torch.zeros(r, K, device="cuda", dtype=torch.float64)
    for rows in torch.arange(M, device="cuda").split(2**15):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        kept = x[part].float() * dropout.unpack_mask(mask[part], K)
        sums += (dS[part].t() @ kept).double()
    assert (dA.double() - sums).norm() / sums.norm() < 2**-7


@each_backend
def test_outputs_of_more_elements_than_32_bits_count(backend, much_memory):
    """As for inputs."""
    M, K, N, r = 2**18 + 3, 64, 2**13 + 64, 4
    assert M * N > 2**31
    x, W, A, B = draw(M, K), draw(N, K, std=K**-0.5), draw(r, K, std=K**-0.5), draw(N, r)
    bias, blocks = draw(N), Blocks.single(N)
    chosen = backends.select(backend, "cuda", BF16)
    last = slice(M - 40, M)
    S, _ = chosen.shrink(x, A, 2.0, 0, None)
    Y = chosen.expand(x, W, bias, S, B, blocks)
    expected = x[last].float() @ W.float().t() + S[last] @ B.float().t() + bias.float()
    torch.testing.assert_close(Y[last].float(), expected, rtol=2e-2, atol=5e-2)
    dY = Y.normal_()
    dS, dB = chosen.grad_expand(dY, S, B, 2.0, blocks, True, True)
    expected = 2 * dY[last].float() @ B.float()
    torch.testing.assert_close(dS[last], expected, rtol=1e-2, atol=1.0)
    sums = torch.zeros(N, r, device="cuda", dtype=torch.float64)
    for rows in torch.arange(M, device="cuda").split(2**15):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        sums += (dY[part].float().t() @ S[part]).double()
    assert (dB.double() - sums).norm() / sums.norm() < 2**-7
    dX = chosen.grad_input(dY, W, dS, A, None)
    expected = dY[last].float() @ W.float() + dS[last] @ A.float()
    error = (dX[last].float() - expected).norm() / expected.norm()
    assert error < 2**-7


# ---- PyTorch around it


@each_backend
@pytest.mark.parametrize("kind", ["linear", "merged"])
def test_a_graph_draws_a_new_mask_at_each_replay(kind, backend):
    made = layer(kind)
    x, grad = draw(256, 512), draw(256, 768)
    with fastlora.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(made, x, grad)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(made, x, grad)
        replays = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            graph.replay()
            replays.append([t.clone() for t in captured])
        graph.replay()
        assert same_bits(replays[0], replays[1])
        assert not same_bits(replays[0], replays[2])
        assert not same_bits(captured, replays[2])
        # new values in the same memory are seen
        x.copy_(draw(256, 512))
        torch.manual_seed(6)
        graph.replay()
        again = [t.clone() for t in captured]
        torch.manual_seed(6)
        graph.replay()
        assert same_bits(again, captured) and not same_bits(again, replays[2])


@each_backend
def test_no_call_waits_for_the_device(backend):
    made = layer("merged")
    x, grad = draw(256, 512), draw(256, 768)
    with fastlora.use_backend(backend):
        step(made, x, grad)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(made, x, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_on_another_stream(backend):
    made = layer()
    x, grad = draw(2048, 512), draw(2048, 768)
    with fastlora.use_backend(backend):
        torch.manual_seed(1)
        expected = step(made, x, grad)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # what is on the current stream has to come first, and nothing waits for it elsewhere
            torch.cuda._sleep(10_000_000)
            late = x.clone()
            torch.manual_seed(1)
            got = step(made, late, grad)
        stream.synchronize()
    assert same_bits(got, expected)


@each_backend
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_compiled_is_as_right_as_eager(dtype, backend):
    """With the mask of the same seed, by the rule of ``fastlora.testing``."""
    torch.compiler.reset()
    inputs = testing.make_inputs(512, 256, 384, 16, p=0.1, dtype=dtype, device="cuda")
    leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]

    def function(x, A, B):
        options = {"scaling": inputs.scaling, "p": inputs.p, "seed": inputs.seed}
        return fastlora.functional.lora_linear(
            x, inputs.weight, A, B, bias=inputs.bias, backend=backend, **options
        )

    y = torch.compile(function, fullgraph=True)(*leaves)
    gradients = torch.autograd.grad(y, leaves, inputs.grad)
    names = ("y", "d_x", "d_lora_A", "d_lora_B")
    got = dict(zip(names, (y.detach(), *gradients), strict=True))
    plain, exact = testing.composition(inputs), testing.truth(inputs)
    testing.assert_no_worse(got, *({name: of[name] for name in got} for of in (plain, exact)))


@each_backend
@pytest.mark.parametrize("dtypes", DTYPES)
def test_layers_that_share_an_input(dtypes, backend):
    """Each is what it is alone, bit for bit, and the sum of their gradients of x as right."""
    options = dict(zip(("dtype", "factor_dtype"), DTYPES[dtypes], strict=True), device="cuda")
    sizes = ((512, 16, 0.1), (384, 8, 0.0), (128, 33, 0.5))
    inputs = [
        testing.make_inputs(777, 512, N, r, p=p, seed=i, **options)
        for i, (N, r, p) in enumerate(sizes)
    ]
    inputs = [replace(i, x=inputs[0].x) for i in inputs]
    x, *_ = leaves = [
        t.requires_grad_()
        for t in (inputs[0].x, *(t for i in inputs for t in (i.lora_A, i.lora_B)))
    ]
    lists = {"weights": "weight", "lora_A": "lora_A", "lora_B": "lora_B", "bias": "bias"}
    lists |= {"scaling": "scaling", "p": "p", "seeds": "seed"}
    together = fastlora.functional.multi_lora_linear(
        x, **{name: [getattr(i, of) for i in inputs] for name, of in lists.items()}, backend=backend
    )
    apart = [
        fastlora.functional.lora_linear(
            x, **{of: getattr(i, of) for of in lists.values()}, backend=backend
        )
        for i in inputs
    ]
    results = []
    for Y in (together, apart):
        d_x, *gradients = torch.autograd.grad(Y, leaves, [i.grad for i in inputs])
        results.append((d_x, [*Y, *gradients]))
    (d_x, got), (_, expected) = results
    assert same_bits(got, expected)
    plain, exact = (
        sum(of(i)["d_x"] for i in inputs) for of in (testing.composition, testing.truth)
    )
    testing.assert_no_worse({"d_x": d_x}, {"d_x": plain}, {"d_x": exact})


@each_backend
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_of_a_float32_layer(dtype, backend):
    made = layer(dtype=FP32, p=0.0)
    x = draw(256, 512, dtype=FP32)
    exact = torch.nn.functional.linear(x, made.weight + made.delta_weight(), made.bias)
    with fastlora.use_backend(backend), torch.autocast("cuda", dtype):
        y = made(x)
    assert y.dtype == dtype
    error = (y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < torch.finfo(dtype).eps
    y.float().sum().backward()
    assert made.lora_A.grad.dtype == FP32


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_peak_memory_is_the_outputs_and_little_more(p, backend):
    M, K, N, r = 8192, 4096, 4096, 16
    made = layer(K=K, N=N, r=r, p=p)
    x, grad = draw(M, K).requires_grad_(), draw(M, N)
    with fastlora.use_backend(backend):
        for _ in range(2):
            y = made(x)
            torch.autograd.grad(y, [x, made.lora_A, made.lora_B], grad)
        del y
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = made(x)
        held = torch.cuda.memory_allocated() - before
        torch.autograd.grad(y, [x, made.lora_A, made.lora_B], grad)
        peak = torch.cuda.max_memory_allocated() - before
    Y, S, mask = 2 * M * N, 4 * M * r, M * K // 8 * (p > 0)
    # the allocator rounds up; partial sums of dA and dB are small beside Y
    assert held <= Y + S + mask + 2**20
    assert peak <= Y + 2 * M * K + 2 * S + mask + Y // 2


# ---- memory checkers

SMALL = """
import torch, fastlora
from fastlora.blocks import Blocks
from fastlora import testing
thirds = Blocks((30, 30, 30), (True, False, True))
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for dtype, factors in ((bf16, None), (fp32, None), (fp16, fp32)):
    for M, K, r, blocks in ((65, 77, 5, thirds), (33, 64, 16, None), (1, 40, 8, None)):
        N = 90 if blocks else 88  # whole vectors
        inputs = testing.make_inputs(
            M, K, N, r, p=0.3, dtype=dtype, factor_dtype=factors, device="cuda", blocks=blocks
        )
        got = testing.fused(inputs, BACKEND)
        testing.assert_no_worse(got, testing.composition(inputs), testing.truth(inputs))
torch.cuda.synchronize()
print("done")
"""


# torch's own kernels, by their namespace, are not what is checked, and slow to check; nor are the
# calls by which libraries find out what the driver can do
SANITIZER = (
    *("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "application-only"),
    *("--kernel-name-exclude", "kernel_substring=N2at", "--report-api-errors", "no"),
)
TOOLS = {"memcheck": ("--padding", "256"), "racecheck": ()}
# a tensor has memory of its own: what is beyond it belongs to none
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@each_backend
@pytest.mark.timeout(140)
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(tool, backend):
    if backend == "reference":
        pytest.skip("it has no kernels of its own")
    if not shutil.which(SANITIZER[0]):
        pytest.skip("compute-sanitizer is not installed")
    program = (sys.executable, "-c", SMALL.replace("BACKEND", repr(backend)))
    with subprocess.Popen(
        [*SANITIZER, "--tool", tool, *TOOLS[tool], *program],
        cwd=Path(__file__).parents[1],
        env=os.environ | UNCACHED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=110)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.skip("compute-sanitizer is too slow here: nothing was found in 110 s")
    if any(refusal in said for refusal in ("Unable to", "Device not supported")):
        pytest.skip(f"compute-sanitizer cannot work here: {said[:500]}")
    assert process.returncode == 0, said[-6000:]
    assert "done" in said
