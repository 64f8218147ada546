"""Operations as torch's counter counts them: as many on each backend, and as the formulas say."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import flops
from fastlora.functional import multi_lora_linear

M, K, N, R = 5, 40, 24, 3
BASE, DOWN, UP = 2 * M * K * N, 2 * M * K * R, 2 * M * N * R


@pytest.fixture(autouse=True, scope="module")
def registered():
    flops.register()
    flops.register()


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("backend_name", ["reference", "native", "triton"], indirect=True)
def test_a_layer(p, backend):
    x = torch.randn(M, K, requires_grad=True)
    layer = fastlora.Linear(K, N, r=R, lora_dropout=p)
    forward, y = counted(lambda: layer(x))
    assert forward == BASE + DOWN + UP
    grad = torch.ones_like(y)
    assert counted(lambda: y.backward(grad))[0] == BASE + 2 * DOWN + 2 * UP
    x.requires_grad_(False)
    y = layer(x)
    assert counted(lambda: y.backward(grad))[0] == DOWN + 2 * UP


@pytest.mark.parametrize("backend_name", ["reference", "native", "triton"], indirect=True)
def test_blocks(backend):
    x = torch.randn(M, K, requires_grad=True)
    layer = fastlora.MergedLinear(K, N, r=R, enable_lora=[True, False, True])
    forward, y = counted(lambda: layer(x))
    assert forward == BASE + 2 * DOWN + 2 * UP // 3
    grad = torch.ones_like(y)
    assert counted(lambda: y.backward(grad))[0] == BASE + 4 * DOWN + 4 * UP // 3


@pytest.mark.parametrize("backend_name", ["reference", "native"], indirect=True)
def test_layers_of_one_input(backend):
    x, W = torch.randn(M, K, requires_grad=True), torch.randn(N, K)
    A, B = (nn.Parameter(torch.randn(shape)) for shape in ((R, K), (N, R)))
    options = {"lora_A": [A, None], "lora_B": [B, None], "scaling": 1.0}
    forward, Y = counted(lambda: multi_lora_linear(x, [W, W], **options))
    assert forward == 2 * BASE + DOWN + UP
    grads = [torch.ones_like(y) for y in Y]
    backward, _ = counted(lambda: torch.autograd.backward(Y, grads))
    assert backward == 2 * BASE + 2 * DOWN + 2 * UP
