"""Chat templates: messages become the text that a checkpoint was trained on. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from qkv.data.sandbox import Program
from qkv.data.tokenizer import Tokenizer
from qkv.errors import QkvError


class ChatTemplate:
    """A checkpoint's chat template, with the special tokens that it writes by names such as bos_token.

    The template is a program that came with the weights: it runs in a sandbox, within bounds of time and memory.
    Raises QkvError where it is no Jinja, or more than a chat template needs.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source, self._tokens = source, dict(tokens)
        self._program = Program(source)

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str = "default") -> "ChatTemplate":
        """The template of that name which came with a tokenizer."""
        if name not in tokenizer.templates:
            known = ", ".join(sorted(tokenizer.templates)) or "none"
            raise QkvError(f"no chat template {name!r} came with the tokenizer ({known} did): a chat model is needed")
        return cls(tokenizer.templates[name], tokenizer.names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation; `tools` are JSON schemas, `variables` whatever else the template knows.

        Raises QkvError where the template refuses the messages, fails, or takes too long or too much.
        """
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        return self._program.run({"documents": None, **self._tokens, **given, **variables})
