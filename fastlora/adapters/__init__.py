"""Adapter files: save a model's adapter, load it into another model."""

from fastlora.adapters.files import load, save
from fastlora.adapters.loralib import export_state_dict, load_state_dict

__all__ = ["export_state_dict", "load", "load_state_dict", "save"]
