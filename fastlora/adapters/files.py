"""Adapter files: safetensors, written whole or not at all, checked before anything is loaded."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from fastlora.adapters import loralib
from fastlora.adapters.sharded import whole
from fastlora.models import lora_layers, lora_state_dict

FORMATS = ("loralib",)


def save(
    model: nn.Module, path: str | os.PathLike[str], format: str = "loralib", *, bias: str = "none"
) -> None:
    """Writes the adapter of ``model`` to a safetensors file.

    Of a model that is sharded over processes, every one of them has to call this, each with a path
    of its own or all with the same.

    Args:
        model: A model with LoRA layers, merged or not.
        path: The file, which is replaced if it exists; never left half written. Of a link, the file
            that it leads to.
        format: "loralib": the keys of ``lora_state_dict``. The metadata holds each layer's scaling.
        bias: Which biases to save with the factors, as for
            :func:`fastlora.mark_only_lora_as_trainable`.

    Raises:
        ValueError: another format or ``bias``, a model without LoRA layers, or a ``path`` that is a
            folder or a device.
        FileNotFoundError: there is no folder to write to.
    """
    _check_format(format)
    scalings = {name: float(layer.scaling) for name, layer in lora_layers(model)}
    if not scalings:
        raise ValueError("model: got no LoRA layer, expected at least one")
    tensors = {key: whole(t).contiguous() for key, t in lora_state_dict(model, bias).items()}
    metadata = {"format": "pt", "adapter": format, "scaling": json.dumps(scalings)}
    # after what processes do together, which none may leave before the others
    target = _writable(path)
    # a process's id is not unique: of threads, and of containers that share a folder
    temporary = target.with_name(f".fastlora-{uuid.uuid4().hex}")
    try:
        # save_file and tempfile would make the file unreadable for others, whatever the umask
        with temporary.open("xb") as file:
            file.write(serialize(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _writable(path: str | os.PathLike[str]) -> Path:
    """The file that is written for ``path``, which need not be there yet."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or the like"
        raise ValueError(f"path: got {path}, which is {kind}, expected a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: got {path}, but its folder does not exist")
    return target


def load(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    assume_merged: bool = False,
) -> None:
    """Loads an adapter, or a loralib checkpoint, into a model of the same LoRA layers.

    Args:
        model: A model with LoRA layers, in any mode, merged or not; a merged layer is merged anew.
        source: A safetensors file, or tensors by name. A pickled checkpoint (``.pt``, ``.bin``) is
            never opened: pass ``torch.load(path, weights_only=True)``.
        assume_merged: See :func:`fastlora.adapters.load_state_dict`.

    Raises:
        ValueError: not a readable safetensors file, another scaling than the model's, or as for
            :func:`fastlora.adapters.load_state_dict`.
        KeyError, TypeError: as there.
        FileNotFoundError: no such file.

    Whatever is raised, the model is as it was.
    """
    if isinstance(source, Mapping):
        loralib.load_state_dict(model, source, assume_merged=assume_merged)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"source: {path} is not a readable safetensors file ({error}); a pickled checkpoint is "
            "passed as torch.load(path, weights_only=True)"
        ) from None
    layers = dict(lora_layers(model))
    for name, scaling in _scalings(path, metadata).items():
        if name in layers and scaling != float(layers[name].scaling):
            raise ValueError(
                f"{name}: the adapter was saved with scaling={scaling:g}, expected "
                f"{float(layers[name].scaling):g}, that of the model (set lora_alpha or "
                "layer.scaling to match)"
            )
    loralib.load_state_dict(model, state, assume_merged=assume_merged)


def _scalings(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Scaling of each layer that the file names."""
    try:
        found = json.loads(metadata.get("scaling", "{}"))
        return {name: float(scaling) for name, scaling in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"source: {path} has scaling={metadata['scaling']!r}, expected numbers by layer"
        ) from None


def _check_format(format: str) -> None:
    if format not in FORMATS:
        expected = ", ".join(map(repr, FORMATS))
        raise ValueError(f"format: got {format!r}, expected one of {expected}")
