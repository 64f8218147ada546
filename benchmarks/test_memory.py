"""The memory counters against cases that are known by heart."""

import torch
from torch import nn

from benchmarks.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_is_the_highest_sum_of_what_lives() -> None:
    def step() -> None:
        a = torch.empty(2 * MIB, dtype=torch.uint8)
        b = torch.empty(3 * MIB, dtype=torch.uint8)
        del a
        c = torch.empty(4 * MIB, dtype=torch.uint8)
        del b, c
        torch.empty(MIB, dtype=torch.uint8)

    assert peak_bytes(step, CPU) == 7 * MIB


def test_peak_of_a_frozen_layer_is_its_output_and_input_gradient() -> None:
    layer = nn.Linear(256, 1024).requires_grad_(False)
    x = torch.randn(512, 256, requires_grad=True)
    grad = torch.randn(512, 1024)

    def step() -> None:
        output = layer(x)
        torch.autograd.grad(output, x, grad)

    assert peak_bytes(step, CPU) == 4 * 512 * (1024 + 256)


def test_saved_counts_a_storage_once_and_leaves_out_what_lives_anyway() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(32, 64)

    def forward() -> torch.Tensor:
        hidden = x @ weight  # saves x and weight, both known
        return hidden * hidden + hidden.view(-1).exp().view_as(hidden)  # saves hidden, exp(hidden)

    assert saved_bytes(forward, [weight, x]) == 2 * 4 * 32 * 64
