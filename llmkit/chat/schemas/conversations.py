"""Schemas of rows for fine-tuning: one function each, from the fields of a row to a conversation or several."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.chat.messages import RowError, read_messages, turn
from llmkit.chat.schemas.table import (
    ALPACA,
    ANSWERS,
    BESIDE,
    CONVERSATIONS,
    Conversation,
    Fields,
    alpaca_prompt,
    schema,
    side,
    string,
)
from llmkit.chat.schemas.trees import TREE, best_paths, is_tree


@schema(CONVERSATIONS, "", "conversations", "kto_tag")
@schema(CONVERSATIONS, "", "messages", "kto_tag")
def _refuse_tagged(fields: Fields, template: bool) -> Conversation:
    raise RowError("field 'kto_tag': an unpaired preference row, which cannot be used for fine-tuning")


@schema(CONVERSATIONS, "messages", "messages", optional=BESIDE)
def _from_messages(fields: Fields, template: bool) -> Conversation:
    """`{"messages": [{"role", "content"}], "tools"?}`"""
    return Conversation(read_messages(fields["messages"], "messages"))


@schema(CONVERSATIONS, "ShareGPT conversations", "conversations", optional=BESIDE)
def _from_sharegpt(fields: Fields, template: bool) -> Conversation:
    """`{"conversations": [{"from", "value"}]}`, from human, gpt, system, function_call or observation."""
    return Conversation(read_messages(fields["conversations"], "conversations"))


@schema(CONVERSATIONS, "", "completion", "label")
def _refuse_unpaired(fields: Fields, template: bool) -> Conversation:
    raise RowError("field 'label': an unpaired preference row, which cannot be used for fine-tuning")


def _refuse_preference(fields: Fields, template: bool) -> Conversation:
    raise RowError("a preference row, with two answers to one prompt, which is input for `llmkit dpo`")


for _names in (("chosen", "rejected"), *ANSWERS):
    schema(CONVERSATIONS, "", *_names)(_refuse_preference)


@schema(CONVERSATIONS, "", "prompt", "completions", "labels")
def _refuse_stepwise(fields: Fields, template: bool) -> Conversation:
    raise RowError("fields 'completions' and 'labels': steps with labels, which are for reward models")


@schema(CONVERSATIONS, "OASST trees", "prompt", optional=TREE, several=True, condition=is_tree)
def _from_tree(fields: Fields, template: bool) -> list[Conversation]:
    """`{"prompt": {"role", "text", "replies": [...]}}`: every path along the best-ranked answers."""
    return [Conversation(path) for path in best_paths(fields["prompt"])]


@schema(
    CONVERSATIONS,
    "prompts with completions",
    "prompt",
    "completion",
    optional=BESIDE,
    answer="completion",
    plain=True,
)
def _from_prompt(fields: Fields, template: bool) -> Conversation:
    """`{"prompt", "completion"}`: strings become a user and an assistant turn, or with `template=False` plain
    text with the loss on the completion. Message lists are joined, with the loss on the completion only.
    """
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not template:
            return Conversation(text=prompt + completion, start=len(prompt))
        return Conversation([turn("user", prompt), turn("assistant", completion)])
    before = [message | {"train": False} for message in side(prompt, "prompt", "user")]
    return Conversation(before + side(completion, "completion", "assistant"))


@schema(CONVERSATIONS, "Alpaca instructions", "instruction", "output", optional=ALPACA, answer="output")
def _from_alpaca(fields: Fields, template: bool) -> Conversation:
    """`{"instruction", "input"?, "output", "system"?, "history"?}`: the instruction, a blank line and the input are the
    user's turn; `history` holds pairs of earlier turns.
    """
    return Conversation([*alpaca_prompt(fields), turn("assistant", string(fields, "output"))])


@schema(CONVERSATIONS, "Dolly instructions", "instruction", "response", optional=ALPACA, answer="response")
def _from_dolly(fields: Fields, template: bool) -> Conversation:
    """The same with `context` for the input and `response` for the output."""
    return Conversation([*alpaca_prompt(fields), turn("assistant", string(fields, "response"))])


@schema(CONVERSATIONS, "instructions with instances", "instruction", "instances", optional=BESIDE, several=True)
def _from_instances(fields: Fields, template: bool) -> list[Conversation]:
    """`{"instruction", "instances": [{"input"?, "output"}]}`: a conversation for each instance."""
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, Mapping) for item in instances):
        raise RowError("field 'instances' is not a list of objects")
    rows = [{"instruction": fields["instruction"], "output": None} | item for item in instances]
    return [Conversation([*alpaca_prompt(row), turn("assistant", string(row, "output"))]) for row in rows]


def _asked(question: str, answer: str) -> None:
    """Register rows with a text for the user's turn and one for the assistant's."""

    @schema(CONVERSATIONS, f"{question} with {answer}", question, answer, optional=BESIDE, answer=answer)
    def _from_pair(fields: Fields, template: bool) -> Conversation:
        return Conversation([turn("user", string(fields, question)), turn("assistant", string(fields, answer))])


for _names in (("question", "answer"), ("inputs", "targets"), ("inputs_pretokenized", "targets_pretokenized")):
    _asked(*_names)


@schema(CONVERSATIONS, "plain text", "text", plain=True)
def _from_text(fields: Fields, template: bool) -> Conversation:
    """`{"text"}`: the loss is on all of it."""
    return Conversation(text=string(fields, "text"))
