"""Every error about shapes, dtypes, devices and options that a user can meet.

Each check names the argument, what was got and what was expected, and runs before anything changed.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastlora.blocks import Blocks

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_LINEAR = ("weight", "lora_A", "lora_B", "bias", "lora_bias")
_LINEARS = ("weights", *_LINEAR[1:])
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    return knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


def knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for this kind of device; there is none for the meta device."""
    return torch.amp.is_autocast_available(device_type)


# torch.compile of torch 2.11 cannot look into it
knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off, also for devices that do not know it."""
    if under_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def shape(name: str, t: Tensor, expected: tuple[int, ...], why: str) -> None:
    """``t`` has exactly the shape ``expected``."""
    if _shape(t) != expected:
        raise ValueError(f"{name}: got shape {_shape(t)}, expected {expected} ({why})")


def tensor(name: str, t: object) -> None:
    """``t`` is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")


def dense(name: str, t: Tensor) -> None:
    """``t`` is a tensor, neither nested nor sparse."""
    tensor(name, t)
    if t.is_nested:
        raise TypeError(
            f"{name}: got a nested tensor, expected a dense one (nn.TransformerEncoder makes none "
            "where its use_nested_tensor is False)"
        )
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {t.layout}, expected a dense tensor")


def base_weight(name: str, weight: Tensor) -> None:
    """The weight of a linear layer is a matrix."""
    tensor(name, weight)
    if weight.dim() != 2:
        raise ValueError(
            f"{name}: got shape {_shape(weight)}, expected (out_features, in_features)"
        )


def count(name: str, values: object, n: int | None = None) -> None:
    """``values`` is a list or tuple, and has an element for each of ``n`` layers."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: got {type(values).__name__}, expected a list or tuple")
    if len(values) != n and (n is not None or not values):
        expected = "one or more" if n is None else f"{n}, one for each of weights"
        raise ValueError(f"{name}: got {len(values)} elements, expected {expected}")


def float_dtype(name: str, dtype: torch.dtype) -> None:
    """``dtype`` is one that the library computes in."""
    if dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(d) for d in FLOAT_DTYPES)
        raise TypeError(f"{name}: got dtype {dtype}, expected one of {expected}")


def float_tensors(**tensors: Tensor | None) -> None:
    """Each is a tensor of a dtype the library computes in; the biases may be None."""
    for name, t in tensors.items():
        if t is not None or "bias" not in name:
            tensor(name, t)
            float_dtype(name, t.dtype)  # type: ignore[union-attr]


def same_device(reference: str, device: torch.device, **others: Tensor | None) -> None:
    """Every tensor given is on ``device``."""
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(
                f"{name}: got device {t.device}, expected {device}, the device of {reference}"
            )


def base_dtype(dtype: torch.dtype, **base: Tensor | None) -> None:
    """Weight and bias of the base layer have the dtype of the input."""
    for name, t in base.items():
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected {dtype}, the dtype of x")


def factor_dtypes(dtype: torch.dtype, **factors: Tensor | None) -> None:
    """Factors have the compute dtype, or all are fp32 over a 16-bit one."""
    allowed = (dtype, torch.float32) if dtype in _SIXTEEN_BIT else (dtype,)
    seen: dict[torch.dtype, str] = {}
    for name, t in factors.items():
        if t is None:
            continue
        if t.dtype not in allowed:
            expected = " or ".join(str(d) for d in allowed)
            raise TypeError(f"{name}: got dtype {t.dtype}, expected {expected} for a {dtype} input")
        seen.setdefault(t.dtype, name)
    if len(seen) > 1:
        got = ", ".join(f"{name} {d}" for d, name in seen.items())
        raise TypeError(f"factors: got {got}, expected one dtype for all of them")


def number(name: str, value: Any) -> float:
    """``value`` as a finite number of Python's: NumPy's are taken, too."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: got {value!r}, expected a number")
        value = float(value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return value


def probability(name: str, p: Any) -> float:
    """``p`` as a number of Python's, in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        if isinstance(p, bool) or not isinstance(p, Real):
            raise TypeError(f"{name}: got {p!r}, expected a probability in [0, 1]")
        p = float(p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: got {p}, expected a probability in [0, 1]")
    return p


def integer(name: str, value: Any) -> int:
    """``value`` as an int: whatever Python takes for an index, but no bool."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {value!r}, expected an int")


def boolean(name: str, value: Any) -> bool:
    """``value`` as a bool: NumPy's are taken, too."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def rank(name: str, r: Any) -> int:
    """``r`` as an int, 0 (plain layer) or more."""
    r = integer(name, r)
    if r < 0:
        raise ValueError(f"{name}: got {r}, expected 0 (no adapter) or a positive rank")
    return r


def scaling(name: str, value: Any) -> float | Tensor:
    """``value`` as a finite number, or a 0-d tensor that needs no gradient."""
    if not isinstance(value, Tensor):
        return number(name, value)
    if value.numel() != 1 or value.requires_grad:
        raise ValueError(
            f"{name}: got a tensor of shape {_shape(value)} with requires_grad="
            f"{value.requires_grad}, expected a number or one element that needs no gradient"
        )
    return value.reshape(()) if value.dim() else value


def seed(name: str, seed: Tensor | None, device: torch.device) -> None:
    """A dropout seed is one int64 on the input's device."""
    if seed is None:
        return
    tensor(name, seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{name}: got {seed.dtype} of shape {_shape(seed)}, expected one int64 element"
        )
    same_device("x", device, **{name: seed})


def enabled(enable_lora: Any) -> tuple[bool, ...]:
    """``enable_lora`` as a tuple of bools."""
    if isinstance(enable_lora, str) or not isinstance(enable_lora, Iterable):
        raise TypeError(f"enable_lora: got {enable_lora!r}, expected a list of one bool a block")
    return tuple(boolean(f"enable_lora[{i}]", on) for i, on in enumerate(enable_lora))


def blocks(
    out_features: int,
    enable_lora: Sequence[bool],
    out_splits: Sequence[int] | None,
    interleave: int,
) -> Blocks:
    """The layout these options describe.

    Raises:
        ValueError: the blocks do not fill ``out_features``, or do not divide.
        TypeError: ``enable_lora`` holds anything but bools, or a size is not an int.
    """
    adapted = enabled(enable_lora)
    interleave = integer("interleave", interleave)
    if not adapted:
        raise ValueError("enable_lora: got an empty list, expected one bool a block")
    if out_splits is None:
        if out_features % len(adapted):
            raise ValueError(
                f"enable_lora: got {len(adapted)} blocks for out_features={out_features}, "
                "expected a number that divides it (or pass out_splits for uneven blocks)"
            )
        splits = (out_features // len(adapted),) * len(adapted)
    else:
        if isinstance(out_splits, str) or not isinstance(out_splits, Iterable):
            raise TypeError(f"out_splits: got {out_splits!r}, expected a list of sizes")
        splits = tuple(integer(f"out_splits[{i}]", n) for i, n in enumerate(out_splits))
    if len(splits) != len(adapted):
        raise ValueError(
            f"out_splits: got {len(splits)} blocks, expected {len(adapted)}, as in enable_lora"
        )
    if min(splits) <= 0 or sum(splits) != out_features:
        raise ValueError(
            f"out_splits: got {list(splits)} with sum {sum(splits)}, "
            f"expected positive sizes that add up to out_features={out_features}"
        )
    if interleave < 1 or any(n % interleave for n in splits):
        raise ValueError(
            f"interleave: got {interleave}, expected a positive number that divides every block "
            f"of {list(splits)}"
        )
    return Blocks(splits, adapted, interleave)


def block_factors(
    lora_A: Tensor, lora_B: Tensor, layout: Blocks, K: int, A: str = "lora_A", B: str = "lora_B"
) -> None:
    """The factors of a linear layer, named ``A`` and ``B``, have the shapes of its blocks."""
    if lora_B.dim() != 2:
        raise ValueError(f"{B}: got shape {_shape(lora_B)}, expected (out_features, r)")
    n, r = layout.adapted_features, lora_B.shape[1]
    shape(B, lora_B, (n, r), f"out_features {n} of the adapted blocks")
    shape(A, lora_A, (layout.count * r, K), f"r={r} of {B}, in_features={K}")


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    layout: Blocks,
    dtype: torch.dtype,
    at: int | None = None,
) -> None:
    """The tensors of a LoRA linear fit together; ``dtype`` is what the call computes in.

    ``at`` is where they stand in the lists of a call that takes several of each.
    """
    if _linear_fits(x, weight, lora_A, lora_B, bias, lora_bias, layout, dtype):
        return
    W, A, B, b, lora_b = _LINEAR if at is None else (f"{name}[{at}]" for name in _LINEARS)
    base = {W: weight, b: bias}
    factors = {A: lora_A, B: lora_B, lora_b: lora_bias}
    float_tensors(x=x, **base, **factors)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"x: got shape {_shape(x)}, expected (..., {K}), in_features of {W} {(N, K)}"
        )
    if layout.out_features != N:
        raise ValueError(
            f"{W}: got {N} output features, expected {layout.out_features}, the blocks' sum"
        )
    block_factors(lora_A, lora_B, layout, K, A, B)
    if bias is not None:
        shape(b, bias, (N,), f"out_features of {W} {(N, K)}")
    if lora_bias is not None:
        shape(lora_b, lora_bias, (layout.adapted_features,), f"out_features of {B}")
    same_device("x", x.device, **base, **factors)
    if under_autocast(x.device):
        return
    base_dtype(dtype, **base)
    factor_dtypes(dtype, **factors)


def _linear_fits(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    layout: Blocks,
    dtype: torch.dtype,
) -> bool:
    """Whether all is as it mostly is; decided in a few microseconds, with no message prepared."""
    tensors = (x, weight, lora_A, lora_B) if bias is None else (x, weight, lora_A, lora_B, bias)
    for t in tensors:
        if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != x.device:
            return False
    N, K = weight.shape
    B_shape = lora_B.shape
    return (
        lora_bias is None
        and dtype in FLOAT_DTYPES
        and x.shape[-1:] == (K,)
        and layout.out_features == N
        and len(B_shape) == 2
        and B_shape[0] == layout.adapted_features
        and lora_A.shape == (layout.count * B_shape[1], K)
        and (bias is None or bias.shape == (N,))
    )


def embedding(
    index: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, padding_idx: int | None
) -> None:
    """The tensors of a LoRA embedding fit together."""
    dense("index", index)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: got dtype {index.dtype}, expected torch.int64 or torch.int32")
    float_tensors(weight=weight, lora_A=lora_A, lora_B=lora_B)
    if weight.dim() != 2 or lora_A.dim() != 2:
        raise ValueError(
            f"weight, lora_A: got shapes {_shape(weight)} and {_shape(lora_A)}, "
            "expected (num_embeddings, embedding_dim) and (r, num_embeddings)"
        )
    V, D = weight.shape
    r = lora_A.shape[0]
    shape("lora_A", lora_A, (r, V), f"num_embeddings of weight {(V, D)}")
    shape("lora_B", lora_B, (D, r), f"embedding_dim of weight {(V, D)}, r={r} of lora_A")
    same_device("index", index.device, weight=weight, lora_A=lora_A, lora_B=lora_B)
    factor_dtypes(weight.dtype, lora_A=lora_A, lora_B=lora_B)
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"padding_idx: got {padding_idx}, expected a row of num_embeddings={V}")


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, dtype: torch.dtype) -> None:
    """Input, kernel and bias of a convolution fit together."""
    float_tensors(x=x, weight=weight, bias=bias)
    if groups < 1:
        raise ValueError(f"groups: got {groups}, expected a positive number")
    if not 3 <= weight.dim() <= 5:
        raise ValueError(
            f"weight: got shape {_shape(weight)}, expected (out_channels, in_channels / groups, "
            "*kernel) with one to three dimensions of the kernel"
        )
    channels = weight.shape[1] * groups
    batched = x.dim() == weight.dim()
    if x.dim() not in (weight.dim(), weight.dim() - 1) or x.shape[int(batched)] != channels:
        size = ", ".join("*" * (weight.dim() - 2))
        raise ValueError(
            f"x: got shape {_shape(x)}, expected (batch, {channels}, {size}) or "
            f"({channels}, {size})"
        )
    if len(weight) % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of out_channels={len(weight)}")
    if bias is not None:
        shape("bias", bias, (len(weight),), "out_channels of weight")
    same_device("x", x.device, weight=weight, bias=bias)
    if not under_autocast(x.device):
        base_dtype(dtype, weight=weight, bias=bias)


def per_dimension(
    name: str, value: int | Sequence[int], dims: int, least: int = 1
) -> tuple[int, ...]:
    """An option of a convolution as one int a dimension: given as such, or as one for all."""
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(given) not in (1, dims):
        raise ValueError(f"{name}: got {given}, expected one number or {dims}")
    numbers = tuple(integer(name, n) for n in given)
    if min(numbers) < least:
        raise ValueError(f"{name}: got {value}, expected {least} or more")
    return numbers if len(numbers) == dims else numbers * dims


def padding(
    padding: int | Sequence[int] | str, padding_mode: str, stride: tuple[int, ...]
) -> tuple[int, ...] | str:
    """The padding of a convolution as one int a dimension, or "same"; its mode is known."""
    if padding_mode not in PADDING_MODES:
        expected = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode: got {padding_mode!r}, expected one of {expected}")
    if not isinstance(padding, str):
        return per_dimension("padding", padding, len(stride), least=0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: got {padding!r}, expected numbers, 'same' or 'valid'")
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f"padding: got 'same' with stride {stride}, expected stride 1")
    return (0,) * len(stride) if padding == "valid" else padding


def conv_factors(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shape_A: tuple[int, ...],
    shape_B: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """The factors of a convolution have these shapes, and dtypes that fit the input."""
    float_tensors(lora_A=lora_A, lora_B=lora_B)
    shape("lora_A", lora_A, shape_A, "from weight, groups and the rank of lora_B")
    shape("lora_B", lora_B, shape_B, "from weight and the rank of lora_A")
    same_device("x", x.device, lora_A=lora_A, lora_B=lora_B)
    if not under_autocast(x.device):
        factor_dtypes(dtype, lora_A=lora_A, lora_B=lora_B)
