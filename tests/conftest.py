"""Tests are many and small: one thread each, several at a time."""

import torch

torch.set_num_threads(1)
