"""What ``loralib.utils`` holds, under its names."""

from fastlora.models import lora_state_dict, mark_only_lora_as_trainable

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]
