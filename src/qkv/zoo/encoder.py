"""What the encoders that grew from BERT share: embeddings, blocks and heads, and the names of their tensors."""

from qkv.masks import Full
from qkv.models import Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    FeedForward,
    Head,
    LayerNorm,
    Learned,
    Output,
    Pool,
    Span,
    Stack,
    Tagger,
    Tokens,
    Transform,
)  # fmt: skip
from qkv.zoo.config import Config

BODY = """
    bert.embeddings.word_embeddings                             embed.tokens
    bert.embeddings.position_embeddings                         embed.position
    bert.embeddings.token_type_embeddings                       embed.segments
    bert.embeddings.LayerNorm                                   embed.norm
    bert.encoder.layer.{i}.attention.self.{query,key,value}     stack.{i}.attn.f.{q,k,v}
    bert.encoder.layer.{i}.attention.output.dense               stack.{i}.attn.f.o
    bert.encoder.layer.{i}.attention.output.LayerNorm           stack.{i}.attn.post
    bert.encoder.layer.{i}.{intermediate,output}.dense          stack.{i}.ffn.f.{up,down}
    bert.encoder.layer.{i}.output.LayerNorm                     stack.{i}.ffn.post
    ~ bert.embeddings.position_ids
"""
"""Everything below the head, as BERT's files name it."""


def vocabulary(spec: Sequence, stem: str) -> str:
    """The rows of a head over the vocabulary: files hold its bias twice, and if it is not tied the decoder's counts."""
    if isinstance(spec.head, Head) and not spec.head.tied:
        return f"""
    {stem}.decoder              head
    {stem}.bias                 head.bias
    + {stem}.bias
"""
    return f"""
    {stem}.bias                 head.bias
    = {stem}.decoder.bias       head.bias
    = {stem}.decoder.weight     embed.tokens.weight
"""


def classifier(spec: Sequence) -> str:
    """The rows of a classifier that has a second layer for a text, and none for the tokens."""
    if not isinstance(spec.head, Classifier):
        return """
    classifier                  head.out
"""
    return """
    classifier.dense            head.pool.transform.dense
    classifier.out_proj         head.out
"""


def encoder(
    c: Config, head: Output | None, *, inner: int | None = None, offset: int = 0, use: tuple[int, ...] | None = None
) -> Sequence:
    """BERT below a head: embeddings may be narrower, positions begin at an offset, layers `use` the same weights."""
    c.only("position_embedding_type", "absolute")
    dropout, after = c.number("hidden_dropout_prob"), norm(c)
    attention = Attention(c.integer("num_attention_heads"), bias=True, dropout=c.number("attention_probs_dropout_prob"))
    ffn = FeedForward(c.integer("intermediate_size"), act=c.act("hidden_act"))
    block = Block(attn=Branch(attention, post=after, dropout=dropout), ffn=Branch(ffn, post=after, dropout=dropout))
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(
            c.integer("vocab_size"),
            width=inner,
            position=Learned(c.integer("max_position_embeddings"), offset=offset),
            segments=c.integer("type_vocab_size"),
            norm=after,
            dropout=dropout,
        ),
        stack=Stack(block, depth=len(use) if use else c.depth("num_hidden_layers"), use=use),
        mask=Full(),
        head=head,
    )


def norm(c: Config) -> LayerNorm:
    return LayerNorm(c.number("layer_norm_eps", 1e-12))


def head(c: Config, transform: Transform, pool: Pool, dropout: float) -> Output | None:
    """What an encoder's class puts on top; `pool` makes the vector of a text for classes."""
    tied = c.flag("tie_word_embeddings", True)
    if c.task in ("MaskedLM", "PreTraining"):
        return Head(tied=tied, bias=True, transform=transform)
    if c.task == "SequenceClassification":
        return Classifier(c.labels(), pool=pool, dropout=dropout)
    if c.task == "TokenClassification":
        return Tagger(c.labels(), dropout=dropout)
    if c.task == "QuestionAnswering":
        return Span()
    c.headless()
    return None


def last_dropout(c: Config) -> float:
    """Before the classes: of its own, or as everywhere."""
    return c.number("classifier_dropout", c.number("hidden_dropout_prob"))
