"""Mixing without attention against numpy's transform, transformers' FNet and the plain products."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FNetConfig
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

from qkv.context import Context
from qkv.errors import QkvError
from qkv.masks import Causal, Prefix
from qkv.parts import Fourier, TokenMixing
from tests.parts.helpers import run, seeded, wild

C, T = 6, 9
LENGTHS = torch.tensor([T, 4, 1, 0, 4])


def tokens(rows: int = len(LENGTHS), length: int = T) -> Tensor:
    return torch.randn(rows, length, C, dtype=torch.float64, generator=seeded(1))


def test_each_row_is_transformed_over_its_own_length():
    body, x = Fourier().build(C), tokens()
    out = run(body, x, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        if n:
            np.testing.assert_allclose(out[row, :n].numpy(), np.fft.fft2(x[row, :n].numpy()).real, atol=1e-12)
    assert not out[3].any() and not list(body.parameters())
    np.testing.assert_allclose(run(body, x).numpy(), np.fft.fft2(x.numpy()).real, atol=1e-12)


def test_it_is_fnet_s():
    theirs = FNetBasicFourierTransform(FNetConfig(hidden_size=C, use_tpu_fourier_optimizations=False))
    torch.testing.assert_close(run(Fourier().build(C), tokens()), theirs(tokens())[0])


def test_gradients_flow_through_rows_of_any_length():
    body, x = Fourier().build(C), tokens().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(body, x, lengths=LENGTHS), x)


def test_halves_are_transformed_in_single_precision():
    body, x = Fourier().build(C), tokens().bfloat16()
    out = run(body, x, lengths=LENGTHS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, run(body, x.double(), lengths=LENGTHS).bfloat16())


def test_time_is_mixed_by_a_network_of_its_own():
    body, x = wild(TokenMixing(T, hidden=7).build(C)), tokens()
    up, down = body.up, body.down
    assert up.weight.shape == (7, T) and down.weight.shape == (T, 7)

    def mixed(row: Tensor) -> Tensor:
        """Channel by channel."""
        after = [down.weight @ F.gelu(up.weight @ row[:, c] + up.bias) + down.bias for c in range(C)]
        return torch.stack(after, 1)

    torch.testing.assert_close(run(body, x), torch.stack([mixed(row) for row in x]))
    out = run(body, x[:, :6], lengths=LENGTHS.clamp(max=6))
    for row, n in enumerate(LENGTHS.clamp(max=6).tolist()):
        zeros = torch.cat((x[row, :n], torch.zeros(T - n, C, dtype=torch.float64)))
        torch.testing.assert_close(out[row, :n], mixed(zeros)[:n])


def test_what_cannot_be_is_refused_in_a_sentence():
    body = TokenMixing(4, hidden=3).build(C)
    with pytest.raises(QkvError, match=r"^a TokenMixing of 4 tokens was given 9: cut the text, or build it for"):
        run(body, tokens().float())
    with pytest.raises(QkvError, match="tokens and hidden are each at least 1, not 0 and 3"):
        TokenMixing(0, hidden=3)
    for whole in (body, Fourier().build(C)):
        with pytest.raises(QkvError, match=r"sees tokens to come, .*: use the mask Full\(\)$"):
            whole.new_cell(1, 5, {})
        for mask in (Causal(), Causal() | Prefix()):
            with pytest.raises(QkvError, match=r"sees tokens to come, .*: use the mask Full\(\)$"):
                whole(tokens(), Context(torch.arange(T)[None], mask))
