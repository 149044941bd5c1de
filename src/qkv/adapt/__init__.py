"""What is done to a finished model: adapters beside its weights, weights of fewer bits, experts."""

from qkv.adapt.lora import LoRA, Merged, add_lora, lora_state, loras, merge, remove_lora, train_only, unmerge
from qkv.adapt.peft import Report, load_adapter, save_adapter
from qkv.adapt.quantise import Quantised, dequantise, quantise
from qkv.adapt.upcycle import upcycle

__all__ = [
    "LoRA",
    "Merged",
    "Quantised",
    "Report",
    "add_lora",
    "dequantise",
    "load_adapter",
    "lora_state",
    "loras",
    "merge",
    "quantise",
    "remove_lora",
    "save_adapter",
    "train_only",
    "unmerge",
    "upcycle",
]
