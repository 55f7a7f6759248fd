"""Schemas of rows for fine-tuning: one function each, from the fields of a row to a conversation or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmkit.chat.messages import RowError, read_messages, turn
from llmkit.chat.schemas.table import (
    ALPACA,
    ANSWERS,
    BESIDE,
    CONVERSATIONS,
    Conversation,
    Fields,
    LeftOut,
    Unused,
    alpaca_prompt,
    schema,
    side,
    string,
)
from llmkit.chat.schemas.trees import TREE_FIELDS, best_paths, is_tree, read_tree


@schema(CONVERSATIONS, "", "kto_tag")
def _refuse_tagged(fields: Fields, template: bool) -> Conversation:
    """Refused even where the tag is true: a file of such rows was made for another method, and half of its answers are
    examples of what not to write."""
    raise RowError(
        "field 'kto_tag': an unpaired preference row, which cannot be used for fine-tuning"
        " (to train on the answers that are tagged true, keep only their rows, without 'kto_tag')"
    )


@schema(CONVERSATIONS, "messages", "messages", optional=BESIDE)
def _from_messages(fields: Fields, template: bool) -> Conversation:
    """`{"messages": [{"role", "content"}], "tools"?}`"""
    return Conversation(read_messages(fields["messages"], "messages"))


@schema(CONVERSATIONS, "", "conversations", "chosen", "rejected")
def _refuse_preference(fields: Fields, template: bool) -> Conversation:
    raise RowError("a preference row, with two answers to one prompt, which is input for `llmkit dpo`")


@schema(CONVERSATIONS, "ShareGPT conversations", "conversations", optional=BESIDE)
def _from_sharegpt(fields: Fields, template: bool) -> Conversation:
    """`{"conversations": [{"from", "value"}]}`, from human, gpt, system, function_call or observation."""
    return Conversation(read_messages(fields["conversations"], "conversations"))


@schema(CONVERSATIONS, "", "completion", "label")
def _refuse_unpaired(fields: Fields, template: bool) -> Conversation:
    raise RowError("field 'label': an unpaired preference row, which cannot be used for fine-tuning")


for _names in (("chosen", "rejected"), *ANSWERS):
    schema(CONVERSATIONS, "", *_names)(_refuse_preference)


@schema(CONVERSATIONS, "", "prompt", "completions", "labels")
def _refuse_stepwise(fields: Fields, template: bool) -> Conversation:
    raise RowError("fields 'completions' and 'labels': steps with labels, which are for process reward models")


@schema(CONVERSATIONS, "OASST trees or messages", "prompt", optional=TREE_FIELDS, several=True, condition=is_tree)
def _from_tree(fields: Fields, template: bool) -> Iterator[Conversation | LeftOut | Unused]:
    """`{"prompt": {"role", "text", "replies": [...]}}`: every path along the best-ranked answers."""
    tree = read_tree(fields)
    yield from tree.notes
    for path in best_paths(tree):
        yield path if isinstance(path, LeftOut) else Conversation(path)


def _text_pair(name: str, question: str, answer: str, *optional: str) -> None:
    """Register rows with a question and an answer: strings become a user and an assistant turn, or with
    `template=False` plain text with the loss on the answer. Message lists are joined, with the loss on the answer only.
    Of a question with several choices, the wrong ones (`is_correct: false`) are left out.
    """

    @schema(
        CONVERSATIONS,
        name,
        question,
        answer,
        optional=(*BESIDE, *optional),
        answer=answer,
        plain=True,
        several=True,
    )
    def _from_text_pair(fields: Fields, template: bool) -> Iterator[Conversation | LeftOut]:
        if "is_correct" in optional and fields.get("is_correct") is False:
            yield LeftOut("wrong choices")
            return
        asked, told = fields[question], fields[answer]
        if not (isinstance(asked, str) and isinstance(told, str)):
            before = [message | {"train": False} for message in side(asked, question, "user")]
            yield Conversation(before + side(told, answer, "assistant"))
        elif template:
            yield Conversation([turn("user", asked), turn("assistant", told)])
        else:
            yield Conversation(text=asked + told, start=len(asked))


_text_pair("prompts with completions", "prompt", "completion")
# P3 also holds the token ids of both, as `inputs` and `targets`.
P3 = ("is_correct", "inputs", "targets")
_text_pair("inputs_pretokenized with targets_pretokenized", "inputs_pretokenized", "targets_pretokenized", *P3)
_text_pair("inputs with targets", "inputs", "targets", "is_correct")
_text_pair("question with answer", "question", "answer")
_text_pair("prompts with responses", "prompt", "response")


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


@schema(
    CONVERSATIONS,
    "OpenOrca questions",
    "question",
    "response",
    optional=(*BESIDE, "system_prompt"),
    answer="response",
)
def _from_openorca(fields: Fields, template: bool) -> Conversation:
    """`{"system_prompt"?, "question", "response"}`."""
    system = string(fields, "system_prompt") if fields.get("system_prompt") else ""
    before = [turn("system", system)] if system else []
    return Conversation(
        [*before, turn("user", string(fields, "question")), turn("assistant", string(fields, "response"))]
    )


@schema(CONVERSATIONS, "instructions with instances", "instruction", "instances", optional=BESIDE, several=True)
def _from_instances(fields: Fields, template: bool) -> Iterator[Conversation | Unused]:
    """`{"instruction", "instances": [{"input"?, "output"}]}`: a conversation for each instance."""
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, Mapping) for item in instances):
        raise RowError("field 'instances' is not a list of objects")
    for number, instance in enumerate(instances):
        where = f"instances[{number}]."
        row = {"input": "", "output": None} | instance | {"instruction": fields["instruction"]}
        prompt = alpaca_prompt({name: row[name] for name in ("instruction", "input")}, where)
        yield Conversation([*prompt, turn("assistant", string(row, "output", where))])
    for name in dict.fromkeys(name for item in instances for name in item if name not in ("input", "output")):
        yield Unused(f"instances.{name}")


@schema(CONVERSATIONS, "plain text", "text", plain=True)
def _from_text(fields: Fields, template: bool) -> Conversation:
    """`{"text"}`: the loss is on all of it."""
    return Conversation(text=string(fields, "text"))
