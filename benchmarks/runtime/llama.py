"""llama.cpp through its own calls, without what llama-cpp-python does around them."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Llama:
    """A model and a context of so many texts, each with room for so many tokens."""

    def __init__(self, path: Path, threads: int, texts: int, room: int) -> None:
        import llama_cpp as api

        self.api, self.texts = api, texts
        self.quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p())
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = texts * room, texts
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {path.name}")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(512, 0, 1)

    def clear(self) -> None:
        """Forget the texts."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def fill(self, tokens: Sequence[Sequence[int]], start: int) -> None:
        """More tokens for each text, whose first stands at `start`; the last of each is to have its scores."""
        at, batch = 0, self.batch
        for text, row in enumerate(tokens):
            for n, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, start + n
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, text
                batch.logits[at] = n == len(row) - 1
                at += 1
        batch.n_tokens = at

    def run(self) -> np.ndarray[Any, Any]:
        """The likeliest next token of each text."""
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        scores = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (self.texts, self.vocabulary))
        return scores.argmax(1)
