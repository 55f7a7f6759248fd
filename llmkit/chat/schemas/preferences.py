"""Schemas of preference rows: one function each, from the fields of a row to prompt, chosen and rejected answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from llmkit.chat.messages import Messages, RowError, read_messages, turn
from llmkit.chat.schemas.table import (
    ALPACA,
    ANSWERS,
    BESIDE,
    PREFERENCES,
    Fields,
    LeftOut,
    Unused,
    alpaca_prompt,
    common_length,
    schema,
    side,
    string,
)
from llmkit.chat.schemas.trees import TREE_FIELDS, Sides, is_tree, ranked_pairs, read_tree

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
VERDICTS = ("preference", "label", *(f"annotator{number}" for number in range(1, 10)))


def _strings(fields: Fields) -> bool:
    return isinstance(fields["chosen"], str)


def _holds_hh_turns(fields: Fields) -> bool:
    if not _strings(fields):
        return False
    chosen = fields["chosen"].lstrip()
    return chosen.startswith("Human:") and HH_TURN.search("\n\n" + chosen) is not None


@schema(PREFERENCES, "", "chosen", condition=lambda fields: "rejected" not in fields)
def _refuse_without_rejected(fields: Fields) -> Sides:
    raise RowError(f"no field 'rejected' (fields: {', '.join(fields)})")


@schema(PREFERENCES, "", "rejected", condition=lambda fields: "chosen" not in fields)
def _refuse_without_chosen(fields: Fields) -> Sides:
    raise RowError(f"no field 'chosen' (fields: {', '.join(fields)})")


@schema(
    PREFERENCES,
    "",
    "chosen",
    "rejected",
    condition=lambda fields: isinstance(fields["chosen"], str) != isinstance(fields["rejected"], str),
)
def _refuse_unlike(fields: Fields) -> Sides:
    raise RowError("'chosen' and 'rejected' are not both strings or both lists of messages")


@schema(PREFERENCES, "answers to a conversation", "conversations", "chosen", "rejected", optional=BESIDE)
def _from_answers_to_a_conversation(fields: Fields) -> Sides:
    """`{"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}`, as LLaMA-Factory has it."""
    prompt = read_messages(fields["conversations"], "conversations")
    chosen, rejected = (side(fields[name], name, "assistant") for name in ("chosen", "rejected"))
    return prompt, chosen, rejected


@schema(PREFERENCES, "", "completion", "label")
@schema(PREFERENCES, "", "kto_tag")
def _refuse_unpaired(fields: Fields) -> Sides:
    raise RowError("an unpaired preference row: dpo needs a chosen and a rejected answer to the same prompt")


@schema(PREFERENCES, "", "prompt", "completions", "labels")
def _refuse_stepwise(fields: Fields) -> Sides:
    raise RowError(
        "fields 'completions' and 'labels': steps with labels, which are for process reward models (for dpo, make a"
        " pair of a step that is labelled true and one at the same place that is labelled false)"
    )


@schema(PREFERENCES, "OASST trees or messages", "prompt", optional=TREE_FIELDS, several=True, condition=is_tree)
def _from_tree(fields: Fields) -> Iterator[Sides | LeftOut | Unused]:
    """The best-ranked answer of each set of siblings against each of the others."""
    tree = read_tree(fields)
    yield from tree.notes
    yield from ranked_pairs(tree)


def _compared(first: str, second: str) -> None:
    """Register rows with two answers, and the number of the better one: `preference` or `label`, 1, 2, or 0 for a tie;
    or that of several annotators, of whom the majority counts."""

    @schema(
        PREFERENCES,
        "two answers with the better one's number",
        first,
        second,
        optional=("instruction", "prompt", *ALPACA, *VERDICTS),
        several=True,
    )
    def _from_comparison(fields: Fields) -> Iterator[Sides | LeftOut]:
        better = _verdict(fields)
        if better == 0:
            yield LeftOut("ties")
            return
        if "prompt" in fields:
            prompt = side(fields["prompt"], "prompt", "user")
        elif "instruction" in fields:
            prompt = alpaca_prompt(fields)
        else:
            prompt = [turn("user", string(fields, "input"))] if "input" in fields else []
        if not prompt:
            raise RowError("no field 'prompt', 'instruction' or 'input'")
        answers = [side(fields[name], name, "assistant") for name in (first, second)]
        yield prompt, answers[better - 1], answers[2 - better]


for _names in ANSWERS:
    _compared(*_names)


def _verdict(fields: Fields) -> int:
    """1 or 2 for the better answer, as the field or more than half of the annotators say; otherwise 0, a tie."""
    votes = Counter(_number(fields[name], name) for name in VERDICTS if name in fields)
    if not votes:
        raise RowError(f"no field {', '.join(map(repr, VERDICTS[:2]))} with the number of the better answer")
    (better, count), *_ = votes.most_common()
    return better if 2 * count > votes.total() else 0


def _number(value: Any, name: str) -> int:
    text = str(int(value)) if type(value) is float and value in (0, 1, 2) else str(value).strip()
    if isinstance(value, bool) or text not in ("0", "1", "2"):
        raise RowError(f"field {name!r}: {value!r:.60} is not the number of the better answer, 1 or 2, or 0 for a tie")
    return int(text)


@schema(PREFERENCES, "turns in one string (hh-rlhf)", "chosen", "rejected", optional=BESIDE, condition=_holds_hh_turns)
def _from_hh_turns(fields: Fields) -> Sides:
    """Whole conversations whose turns start with `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    chosen, rejected = (_hh_turns(fields[name], name) for name in ("chosen", "rejected"))
    return _split_prompt(chosen, rejected)


@schema(
    PREFERENCES,
    "lists of messages",
    "chosen",
    "rejected",
    optional=("prompt", "instruction", *ALPACA),
    condition=lambda fields: not _strings(fields) and "conversations" not in fields,
)
def _from_message_lists(fields: Fields) -> Sides:
    """Sides that begin with the assistant continue `prompt`; others include the prompt, as their longest common
    prefix.
    """
    chosen, rejected = (side(fields[name], name, "assistant") for name in ("chosen", "rejected"))
    prompt = fields.get("prompt")
    if prompt is None and "instruction" in fields:
        return alpaca_prompt(fields), chosen, rejected
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return side(prompt, "prompt", "user"), chosen, rejected
    return _split_prompt(chosen, rejected)


@schema(
    PREFERENCES,
    "strings with a prompt",
    "prompt",
    "chosen",
    "rejected",
    optional=BESIDE,
)
def _from_prompt_and_strings(fields: Fields) -> Sides:
    """The prompt is a string, a string of hh-rlhf turns, or a list of messages."""
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        return read_messages(prompt, "prompt"), *_answers(fields)
    if not isinstance(prompt, str):
        raise RowError("field 'prompt' is neither a string nor a list of messages")
    before = _hh_turns(prompt, "prompt") if prompt.lstrip().startswith("Human:") else [turn("user", prompt)]
    if before[-1] == turn("assistant", ""):  # hh-rlhf prompts end in "Assistant:"
        before.pop()
    return before, *_answers(fields)


@schema(PREFERENCES, "strings with an Alpaca instruction", "instruction", "chosen", "rejected", optional=ALPACA)
def _from_instruction_and_strings(fields: Fields) -> Sides:
    """`{"instruction", "input"?, "chosen", "rejected"}`"""
    return alpaca_prompt(fields), *_answers(fields)


@schema(
    PREFERENCES,
    "strings with a common beginning",
    "chosen",
    "rejected",
    optional=BESIDE,
    condition=lambda fields: fields.get("prompt") is None,
)
def _from_common_beginning(fields: Fields) -> Sides:
    """Without `prompt`, the longest common prefix in whole words is the prompt."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    common = chosen[: common_length(chosen, rejected)]
    common = common[: max(common.rfind(" "), common.rfind("\n")) + 1]  # whole words
    if not common.strip():
        raise RowError("no field 'prompt', and 'chosen' and 'rejected' have no common beginning")
    prompt = [turn("user", common.rstrip())]
    return prompt, [turn("assistant", chosen[len(common) :])], [turn("assistant", rejected[len(common) :])]


def _answers(fields: Fields) -> tuple[Messages, Messages]:
    return [turn("assistant", fields["chosen"])], [turn("assistant", fields["rejected"])]


def _split_prompt(chosen: Messages, rejected: Messages) -> Sides:
    """The longest common prefix of two conversations, and the rest of each."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == 0:
        raise RowError("no field 'prompt', and 'chosen' and 'rejected' have no common first message")
    return chosen[:common], chosen[common:], rejected[common:]


def _hh_turns(text: str, name: str) -> Messages:
    pieces = HH_TURN.split("\n\n" + text.lstrip())
    if pieces[0].strip():
        raise RowError(f"field {name!r}: text before the first 'Human:'")
    turns = [
        turn("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns:
        raise RowError(f"field {name!r}: no 'Human:' or 'Assistant:' turn")
    return turns
