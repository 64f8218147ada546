"""Two memory numbers: what autograd keeps for backward, and the peak of a whole step."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

# above the profiler's highest severity: it reports start and stop of every use otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps alive between forward and backward.

    Each storage counts once, at its full size, however many saved tensors are views of it.

    Args:
        forward: Builds the graph; what it returns is kept until the bytes are counted.
        exclude: Tensors that live anyway (parameters, buffers, the input); their storages are
            left out.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in saved.values())
    del output
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most memory that ``step`` holds at once, on top of what was allocated before it."""
    return _peak_cuda(step, device) if device.type == "cuda" else _peak_cpu(step)


def _peak_cuda(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(step: Callable[[], object]) -> int:
    # the CPU allocator reports each allocation and release to the profiler: the highest running
    # sum is the peak, exactly, with no sampling and no noise from the process's other memory
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        current += change
        peak = max(peak, current)
    return peak
