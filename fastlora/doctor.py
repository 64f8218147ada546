"""``fastlora doctor``: what this machine offers, and whether each backend is right on it."""

import importlib
import json
import platform
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F

import fastlora
from fastlora import backends, dispatch
from fastlora.functional import lora_linear

PACKAGES = ("torch", "triton", "safetensors", "numpy", "transformers", "peft", "loralib")


def run(as_json: bool = False) -> int:
    """Print the report.

    Returns:
        0 where every usable backend passes its self-check, else 1.
    """
    report = collect()
    print(json.dumps(report, indent=2) if as_json else render(report))
    return 0 if report["ok"] else 1


def collect() -> dict[str, Any]:
    """The report as plain data, ready for JSON.

    ``backends`` and ``self_check`` map a name to None where all is well, else to the reason;
    ``tables`` holds, by type of device, the files that the choice of a backend goes by, with where
    their rows come from.
    """
    reasons = backends.available()
    checks = {
        f"{name} on {device}": self_check(name, device)
        for name, reason in reasons.items()
        if reason is None
        for device in _devices(name)
    }
    return {
        "ok": not any(checks.values()),
        "versions": {
            "fastlora": fastlora.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": {
            "name": dispatch.device_name("cpu"),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": _cuda(),
        "extension": _extension(),
        "backends": reasons,
        "tables": {
            device: {str(path): str(table) for path, table in dispatch.tables(device).items()}
            for device in _devices("reference")
        },
        "self_check": checks,
    }


def render(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    cpu, cuda, extension = report["cpu"], report["cuda"], report["extension"]
    sections = {
        "versions": {name: found or "not installed" for name, found in report["versions"].items()},
        "machine": {
            "platform": report["platform"],
            "cpu": f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}",
            **{
                f"cuda:{index}": f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB"
                for index, gpu in enumerate(cuda["devices"])
            },
            **({"cuda": cuda["reason"]} if cuda["reason"] else {}),
            "extension": extension["reason"] or str(extension["build_info"]),
            "CUDA kernels": extension["cuda_obstacle"] or "ready",
        },
        "backends": {name: reason or "usable" for name, reason in report["backends"].items()},
        "tables": {
            device: "; ".join(f"{file}: {said}" for file, said in found.items())
            or "none (`fastlora tune` makes one)"
            for device, found in report["tables"].items()
        },
        "self-check": {
            name: f"failed: {reason}" if reason else "ok"
            for name, reason in report["self_check"].items()
        },
    }
    width = max(len(name) for rows in sections.values() for name in rows)
    blocks = (
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
        for title, rows in sections.items()
    )
    return "\n\n".join(blocks)


def self_check(backend: str, device: str) -> str | None:
    """Forward and backward of one small layer against plain PyTorch.

    The inputs are such small integers that all is exact in every path, and no tolerance is needed;
    in bfloat16, too, which has kernels of its own on a GPU.

    Returns:
        None where all results are equal, else what went wrong.
    """
    try:
        dtypes = [torch.float32, *[torch.bfloat16] * (device == "cuda")]
        wrong = [name for dtype in dtypes for name in _wrong_results(backend, device, dtype)]
    except Exception as error:  # whatever it is, it belongs in the report
        reason = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {reason}"
    return f"wrong {', '.join(dict.fromkeys(wrong))}" if wrong else None


def _wrong_results(backend: str, device: str, dtype: torch.dtype) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)

    # rows of whole vectors, which some kernels are for
    M, K, N, r, scaling = 5, 24, 16, 4, 0.5
    x, A, B = (integers(*shape).requires_grad_() for shape in ((M, K), (r, K), (N, r)))
    W, bias, dY = integers(N, K), integers(N), integers(M, N)
    plain = F.linear(x, W, bias) + scaling * F.linear(F.linear(x, A), B)
    expected = (plain, *torch.autograd.grad(plain, (x, A, B), dY))
    y = lora_linear(x, W, A, B, scaling=scaling, bias=bias, backend=backend)
    got = (y, *torch.autograd.grad(y, (x, A, B), dY))
    names = ("output", "gradient of x", "gradient of lora_A", "gradient of lora_B")
    pairs = zip(names, got, expected, strict=True)
    return [name for name, left, right in pairs if not torch.equal(left, right)]


def _devices(backend: str) -> list[str]:
    there = ["cpu", *["cuda"] * torch.cuda.is_available()]
    return [device for device in there if backends.available(device)[backend] is None]


def _version(package: str) -> str | None:
    if package == "torch":
        # with the CUDA that it was built for, which is not in the package's own
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch finds no usable device" if built else "this torch is a CPU build"
        return {"devices": [], "reason": reason}
    devices = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = round(gpu.total_memory / 2**30)
        devices.append(
            {"name": gpu.name, "capability": f"{gpu.major}{gpu.minor}", "memory_gib": memory}
        )
    return {"devices": devices, "reason": None}


def _extension() -> dict[str, Any]:
    try:
        module = importlib.import_module("fastlora._C")
    except ModuleNotFoundError as error:
        reason = "not built" if error.name == "fastlora._C" else str(error)
        return {"build_info": None, "reason": reason, "cuda_obstacle": reason}
    except ImportError as error:
        return {"build_info": None, "reason": str(error), "cuda_obstacle": str(error)}
    build_info = module.build_info()
    obstacle = module.cuda_obstacle() if build_info["cuda"] else "not built"
    return {"build_info": build_info, "reason": None, "cuda_obstacle": obstacle}
