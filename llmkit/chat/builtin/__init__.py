"""Chat templates by name, for models that have none: the Jinja beside this file, and the tokens that each needs.

    find("chatml").text                  # {%- if tools %}...
    names()                              # ["chatml", "gemma", ...]

A template is one file and one row. Texts are those of the published templates of the same format (tests/chat). A
`bos_token` is written by the templates whose models begin every conversation with one, if the tokenizer has one: a
model that never saw a beginning token does not need one now.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Builtin:
    """A chat template: the control tokens that it writes, and the one which ends a turn ("": the end of text).

    Other words of a format stay text, such as Qwen's <think> and <tool_call>.
    """

    name: str
    tokens: tuple[str, ...] = ()
    stop: str = ""

    @property
    def text(self) -> str:
        """The template."""
        return _read(self.name)


_IM = ("<|im_start|>", "<|im_end|>")
TABLE = (
    Builtin("chatml", _IM, "<|im_end|>"),
    Builtin("gemma", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    Builtin("llama-3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    Builtin("phi-4", (*_IM, "<|im_sep|>"), "<|im_end|>"),
    Builtin("qwen3", _IM, "<|im_end|>"),
    Builtin("tulu"),
)


def names() -> list[str]:
    """The names of the templates."""
    return [item.name for item in TABLE]


def find(name: str) -> Builtin:
    """The template of this name. Raises StopIteration for another one."""
    return next(item for item in TABLE if item.name == name)


@cache
def _read(name: str) -> str:
    return (resources.files("llmkit.chat") / "builtin" / f"{name}.jinja").read_text(encoding="utf-8")
