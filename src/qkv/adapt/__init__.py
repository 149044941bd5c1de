"""What is done to a finished model: adapters beside its weights."""

from qkv.adapt.lora import LoRA, Merged, add_lora, lora_state, loras, merge, remove_lora, train_only, unmerge
from qkv.adapt.peft import Report, load_adapter, save_adapter

__all__ = [
    "LoRA",
    "Merged",
    "Report",
    "add_lora",
    "load_adapter",
    "lora_state",
    "loras",
    "merge",
    "remove_lora",
    "save_adapter",
    "train_only",
    "unmerge",
]
