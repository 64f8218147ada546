"""Tensors that are sharded over processes, as FSDP2 has them."""

from typing import Any

from torch import Tensor


def whole(t: Any) -> Tensor:
    """A copy of a tensor; of a sharded one all of it, which its processes ask for together."""
    copy: Tensor = t.full_tensor() if _is_sharded(t) else t.clone()
    return copy


def placed_like(t: Tensor, own: Any) -> Tensor:
    """``t`` sharded as ``own`` is, if it is, by all of its processes together."""
    if not _is_sharded(own) or _is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(own.device), own.device_mesh, own.placements)


def _is_sharded(t: Tensor) -> bool:
    # without torch.distributed, which not every build of torch has
    return hasattr(t, "device_mesh")
