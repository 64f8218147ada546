"""What a result has to say about the machine and the software it came from."""

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "loralib", "peft", "transformers")


def device_name(device: torch.device) -> str:
    """The marketing name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine()
    return get_cpu_info().get("brand_raw") or platform.machine()


def machine_slug(device: torch.device) -> str:
    """A folder name for results, such as ``cpu-intel-xeon-2c`` or ``gpu-nvidia-h200-132sm``."""
    name = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*", " ", device_name(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    if device.type == "cuda":
        return f"gpu-{name}-{torch.cuda.get_device_properties(device).multi_processor_count}sm"
    return f"cpu-{name}-{os.cpu_count()}c"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fastlora_version() -> str | None:
    try:
        import fastlora  # from the source tree, which need not be installed
    except ImportError:
        return None
    return fastlora.__version__


def _path(device: torch.device) -> str | None:
    """The backend that fastlora takes on its own, and the build of its kernels."""
    try:
        from fastlora import backends
    except ImportError:
        return None
    backend = backends.select("auto", device.type)
    return f"{backend.name} ({backend.description()})"


def _commit() -> str | None:
    """The commit of the source tree, with ``+changes`` when the tree differs from it.

    Without a repository, as where a tree was copied to, what the variable ``COMMIT`` says.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # results are written before this is asked
        changes = git("status", "-s", "--", ":(top)", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def environment(device: torch.device) -> dict[str, object]:
    """Everything needed to judge a number, JSON-ready and free of host names and paths."""
    return {
        "device": device_name(device),
        "slug": machine_slug(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "path": _path(device),
        "packages": {"fastlora": _fastlora_version()} | {p: _version(p) for p in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
