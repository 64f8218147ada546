"""No number without a right result: the check that stands before each timing.

What a step computes is held against float64, by the rule of ``fastlora.testing``: no worse than the
plain composition of the same dtypes, given the same mask. Others may round more often than that,
but not compute something else: they are allowed ten times its errors.

The mask of a step is found by running it once more, from the same state of torch's generator, on
factors and gradients of ones over a weight of zeros: the gradient of x is then zero where an
element was dropped, and nowhere else.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.providers import (
    LORA_ALPHA,
    Case,
    Inputs,
    blocks_of,
    fastlora_with,
    usable_backends,
)
from benchmarks.shapes import Shape

# the rule compares with float64, which a CPU is slow at; rows are alike, so a part of them will do
CPU_ROWS = 512
# an error of few elements says nothing: small shapes are drawn several times and judged together
ELEMENTS = 1 << 13
# loralib's MergedLinear, a convolution over the ranks, has 1.1 times the errors of the composition
OTHERS_SLACK = 10.0

Parameters = dict[str, Tensor]
Results = dict[str, Tensor]


def check(shape: Shape, device: torch.device) -> None:
    """Check every usable backend of fastlora at this layer.

    Raises:
        AssertionError: An output or a gradient is worse than that of the plain composition.
    """
    try:
        names = ["auto", *usable_backends(device.type)]
    except ImportError:
        return
    inputs = Inputs.make(shape, device)
    for name in names:
        check_case(shape, fastlora_with(name)(shape, inputs))


def check_case(shape: Shape, case: Case) -> None:
    """Check one provider; nothing to check without an adapter, or where fastlora is missing.

    Raises:
        AssertionError: An output or a gradient is worse than that of the plain composition.
    """
    try:
        from fastlora import testing
    except ImportError:
        return
    parameters = _roles(case.module)
    if "lora_A" not in parameters:
        return
    device = case.inputs.x.device
    rows = shape.M if device.type == "cuda" else min(shape.M, CPU_ROWS)
    runs: tuple[list[Results], ...] = ([], [], [])
    with torch.random.fork_rng():
        for draw in range(max(1, min(64, ELEMENTS // (rows * shape.r)))):
            x, grad = (t.detach()[:rows] for t in (case.inputs.x, case.inputs.grad))
            if draw:
                torch.manual_seed(draw)
                x, grad = torch.randn_like(x), torch.randn_like(grad)
            # what torch.compile made allocates by itself, and would be compiled anew
            with nullcontext() if hasattr(case.module, "_orig_mod") else poisoned():
                keep = _mask(case, parameters, x, grad, draw) if shape.p else None
                got = _run(_seeded(case, draw), x, parameters, grad)
            plain = _composition(shape, case, keep, x, parameters, grad, lambda t: t)
            exact = _composition(shape, case, keep, x, parameters, grad, Tensor.double)
            for run, result in zip(runs, (got, plain, exact), strict=True):
                run.append(result)
    together = ({name: torch.stack([r[name] for r in run]) for name in run[0]} for run in runs)
    testing.assert_no_worse(*together, slack=1.0 if case.ours else OTHERS_SLACK)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN: else it may hold the right answer, of the kernel before."""
    settings = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # others may use what has no deterministic form
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            settings.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _roles(module: nn.Module) -> Parameters:
    """The parameters of a layer by what they are, whatever a library calls them."""
    roles = ("lora_A", "lora_B", "weight", "bias")
    return {
        next(role for role in roles if role in name): parameter
        for name, parameter in module.named_parameters()
    }


def _seeded(case: Case, seed: int) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        with case.context():
            return case.module(x)

    return layer


def _mask(case: Case, parameters: Parameters, x: Tensor, grad: Tensor, seed: int) -> Tensor:
    values = {"weight": 0.0, "bias": 0.0, "lora_A": 1.0, "lora_B": 1.0}
    with _filled(parameters, values):
        ones = torch.full_like(grad, 1 / grad.shape[1])
        return _run(_seeded(case, seed), x, parameters, ones)["d_x"] != 0


@contextmanager
def _filled(parameters: Parameters, values: dict[str, float]) -> Iterator[None]:
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.fill_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _composition(
    shape: Shape,
    case: Case,
    keep: Tensor | None,
    x: Tensor,
    parameters: Parameters,
    grad: Tensor,
    cast: Callable[[Tensor], Tensor],
) -> Results:
    """Base, dropout, A, B, scale, add, with the mask ``keep``; all operands ``cast`` first."""
    own = {n: cast(p.detach()).requires_grad_(p.requires_grad) for n, p in parameters.items()}
    A, B = own["lora_A"], own["lora_B"]
    p = round(shape.p * 65536) / 65536 if case.ours else shape.p

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, own["weight"], own["bias"])
        wide = x.to(A.dtype)
        S = F.linear(wide if keep is None else wide * keep / (1 - p), A)
        result = y.to(A.dtype).clone()
        for features, ranks, rows in blocks_of(shape):
            result[:, features] += F.linear(S[:, ranks], B[rows]) * (LORA_ALPHA / shape.r)
        return result.to(y.dtype)

    return _run(layer, cast(x), own, cast(grad))


def _run(
    layer: Callable[[Tensor], Tensor], x: Tensor, parameters: Parameters, grad: Tensor
) -> Results:
    x = x.detach().requires_grad_()
    y = layer(x)
    factors = (parameters["lora_A"], parameters["lora_B"])
    names = ("d_x", "d_lora_A", "d_lora_B")
    gradients = torch.autograd.grad(y, [x, *factors], grad)
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
