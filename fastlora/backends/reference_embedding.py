"""The stages of an embedding with a low-rank update, in plain PyTorch.

The down projection of a one-hot row is a column of A, so ``shrink`` is a gather and its gradient a
scatter; the rest is as for a linear layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.backends.reference import accumulation_dtype, row_blocks


def shrink(index: Tensor, A: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``S = scaling * A[:, index]ᵀ``: (M, r), accumulation dtype of ``dtype``, from A (r, V)."""
    return F.embedding(index, A.t()).to(accumulation_dtype(dtype)).mul(scaling)


def expand(index: Tensor, W: Tensor, S: Tensor, B: Tensor) -> Tensor:
    """``Y = W[index] + S Bᵀ``: (M, D), dtype of W (V, D), rounded once; B is (D, r)."""
    Y = F.embedding(index, W)
    Bt = B.to(S.dtype).t()
    for rows in row_blocks(Y.shape[0], Y.shape[1], Y.device.type):
        Y[rows] = torch.addmm(Y[rows].to(S.dtype), S[rows], Bt)
    return Y


def scatter(index: Tensor, rows: Tensor, V: int, padding_idx: int, by_frequency: bool) -> Tensor:
    """The transpose of a gather from a table: (V, d) from (M, d); rows of padding are left out."""
    return torch.ops.aten.embedding_dense_backward(rows, index, V, padding_idx, by_frequency)
