"""MiniLM: texts of 8 to 128 tokens as vectors, from the text on, and how near they are to those in fp32."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.runtime import ours
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work, in_process

from qkv.checkpoints.pull import resolve

MINILM, TEXTS, SHORT, BATCH = "all-minilm-l6-v2", 512, 32, 32
SHORTEST, LONGEST = 8, 128
Vectors = np.ndarray[Any, Any]


def works(settings: Settings) -> Iterator[Work]:
    folder, onnx = resolve(MINILM), settings.folder / "minilm.onnx"
    texts = tuple(sentences(folder, settings.size(TEXTS, SHORT)))
    try:
        in_process(export, folder, onnx)
    except Exception as fault:
        print(f"OpenVINO and ONNX Runtime have nothing to run (pip install onnx onnxscript): {fault}")
    forms = [
        *(Form(f"qkv {kind}", "qkv", qkv, (folder, kind, texts)) for kind in ("fp32", "bf16", "int8")),
        *(Form(f"openvino {kind}", "openvino", openvino, (folder, onnx, kind, texts)) for kind in ("f32", "bf16")),
        Form("onnxruntime int8", "onnxruntime", onnxruntime, (folder, onnx, texts)),
        *(Form(f"transformers {kind}", "sentence-transformers", sentence_transformers, (folder, kind, texts))
          for kind in ("fp32", "bf16")),
    ]  # fmt: skip
    name = f"MiniLM, {len(texts)} texts of {SHORTEST} to {LONGEST} tokens, batches of {BATCH}"
    yield Work(name, forms, "1.5 × OpenVINO, cosine ≥ 0.999", cosine, "transformers fp32")


def sentences(folder: Path, count: int) -> Iterator[str]:
    """Stretches of plain English; their lengths in tokens are drawn evenly."""
    from tokenizers import Tokenizer

    tokenizer, words, draw = plain(folder, Tokenizer), ours.english().split(), random.Random(0)
    for _ in range(count):
        at, length = draw.randrange(len(words) - LONGEST), draw.randint(SHORTEST, LONGEST)
        of = tokenizer.encode(words[at : at + LONGEST], is_pretokenized=True).word_ids[1:-1]
        yield " ".join(words[at : at + max(1, of[length - 2])])


def plain(folder: Path, kind: Any) -> Any:
    """The tokenizer, without the padding and the cuts that its file asks for."""
    tokenizer = kind.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def cosine(vectors: Vectors, truth: Vectors) -> str:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(truth, axis=1)
    cosines = (vectors * truth).sum(1) / lengths
    return f"cosine {cosines.min():.5f} at least, {cosines.mean():.5f} on average"


def timed(encode: Callable[[], Vectors], texts: Sequence[str]) -> Ready:
    vectors: list[Vectors] = []

    def measure() -> Measured:
        began = time.perf_counter()
        vectors[:] = [encode()]
        return {"texts/s": len(texts) / (time.perf_counter() - began)}

    return Ready(measure, lambda: vectors[0])


# --- the forms ---


def qkv(threads: int, folder: Path, kind: str, texts: Sequence[str]) -> Ready:
    """fp32, bf16, or 8 bits in blocks but for the values, which carry most of the error and stay at 16."""
    import torch

    from qkv.adapt import quantise
    from qkv.use import embed, open_published

    torch.set_num_threads(threads)
    task = open_published(folder, torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "int8":
        quantise(task.model, "int8", keep="**.v")
        quantise(task.model, "bf16")
    ours.native(task.model, threads)
    return timed(lambda: embed(task, texts, batch=BATCH, cut=True).numpy(), texts)


def sentence_transformers(threads: int, folder: Path, kind: str, texts: Sequence[str]) -> Ready:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})

    def encode() -> Vectors:
        made = model.encode(
            list(texts), batch_size=BATCH, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        return made.float().numpy()

    return timed(encode, texts)


def onnxruntime(threads: int, folder: Path, onnx: Path, texts: Sequence[str]) -> Ready:
    """Layers fused by its own optimiser, weights in 8 bits per channel, activations on the fly."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    fused, small = onnx.with_suffix(".fused.onnx"), onnx.with_suffix(".int8.onnx")
    optimizer.optimize_model(
        str(onnx), model_type="bert", num_heads=12, hidden_size=384, opt_level=1
    ).save_model_to_file(str(fused))
    quantize_dynamic(fused, small, weight_type=QuantType.QInt8, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    return through(
        lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0], folder, texts
    )  # fmt: skip


def openvino(threads: int, folder: Path, onnx: Path, kind: str, texts: Sequence[str]) -> Ready:
    import openvino as ov

    options = {
        "INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    core = ov.Core()
    model = core.compile_model(core.read_model(str(onnx)), "CPU", options)
    return through(lambda ids, mask: model([ids, mask])[0], folder, texts)


def through(run: Callable[[Vectors, Vectors], Vectors], folder: Path, texts: Sequence[str]) -> Ready:
    """Texts to vectors by a program (ids, mask: B T) → B T C: those of like length together, the mean of each."""
    from tokenizers import Tokenizer

    tokenizer = plain(folder, Tokenizer)

    def encode() -> Vectors:
        ids = [one.ids for one in tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
        vectors: dict[int, Vectors] = {}
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            longest = max(len(ids[row]) for row in rows)
            padded = np.array([ids[row] + [0] * (longest - len(ids[row])) for row in rows], np.int64)
            mask = np.array([[1] * len(ids[row]) + [0] * (longest - len(ids[row])) for row in rows], np.int64)
            mean = (run(padded, mask) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors.update(zip(rows, mean / np.linalg.norm(mean, axis=1, keepdims=True), strict=True))
        return np.stack([vectors[n] for n in range(len(ids))])

    return timed(encode, texts)


def export(folder: Path, target: Path) -> None:
    """MiniLM as an ONNX file, for texts of any number and length."""
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids, mask = torch.randint(5, 1000, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    sizes = {0: torch.export.Dim("batch", min=1, max=512), 1: torch.export.Dim("tokens", min=2, max=512)}
    torch.onnx.export(
        Hidden(), (ids, mask), target, dynamo=True, input_names=["input_ids", "attention_mask"],
        output_names=["hidden"], dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}, external_data=False,
        verbose=False,
    )  # fmt: skip
