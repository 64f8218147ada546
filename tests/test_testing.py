"""The error rule, which other tests, the tuner and the benchmarks rely on."""

import subprocess
import sys

import pytest
import torch

from fastlora import testing


def results(**changed):
    return {**{name: torch.ones(3) for name in ("y", "d_x")}, **changed}


# of what is under test, and what the message says
WRONG = [
    ({"y": torch.full((3,), 1.5)}, "y: max error 0.5"),
    ({"y": torch.ones(3).bfloat16()}, "y: dtype"),
    ({"y": torch.ones(4)}, "y: shape"),
    ({"d_weight": torch.ones(3)}, "d_weight"),
]


@pytest.mark.parametrize(("changed", "match"), WRONG)
def test_the_rule_finds_what_is_wrong(changed, match):
    testing.assert_no_worse(results(), results(), results())
    with pytest.raises(AssertionError, match=match):
        testing.assert_no_worse(results(**changed), results(), results())


def test_the_rule_holds_without_statements_of_assert():
    """``python -O`` leaves those out, and ``fastlora tune`` then took whatever is fastest."""
    program = """
import torch
from fastlora import testing
ones = {"y": torch.ones(3)}
try:
    testing.assert_no_worse({"y": torch.zeros(3)}, ones, ones)
except AssertionError:
    print("found")
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "found\n"
