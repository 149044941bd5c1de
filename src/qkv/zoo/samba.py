"""Samba: Mamba and attention over a window, each followed by a feed-forward (Ren 2024)."""

from qkv.masks import Causal, Window
from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, Gated, Head, Mamba, Mixer, RMSNorm, Rotary, Stack, Tokens
from qkv.zoo.registry import preset


@preset("samba-tiny")
def tiny() -> Sequence:
    """4 layers 128 wide, two of each kind, the window 64 tokens, to stand beside gpt-tiny on the same text."""
    norm, ffn = RMSNorm(), Gated(344)

    def block(f: Mixer) -> Block:
        return Block(attn=Branch(f, pre=norm), ffn=Branch(ffn, pre=norm))

    window = Attention(4, mask=Window(64), position=Rotary())
    stack = Stack((block(Mamba()), block(window)), depth=4)
    return Sequence(128, embed=Tokens(), stack=stack, mask=Causal(), norm=norm, head=Head(tied=True))
