"""Schemas of preference rows: one function each, from the fields of a row to prompt, chosen and rejected answer."""

from __future__ import annotations

import re
from collections import Counter

from llmkit.chat.messages import Messages, RowError, read_messages, turn
from llmkit.chat.schemas.table import (
    ALPACA,
    ANSWERS,
    BESIDE,
    PREFERENCES,
    Fields,
    alpaca_prompt,
    common_length,
    schema,
    side,
    string,
)
from llmkit.chat.schemas.trees import TREE, Sides, is_tree, ranked_pairs

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
VERDICTS = ("preference", "label", *(f"annotator{number}" for number in range(1, 10)))


def _strings(fields: Fields) -> bool:
    return isinstance(fields["chosen"], str)


def _holds_hh_turns(fields: Fields) -> bool:
    if not _strings(fields):
        return False
    chosen = fields["chosen"].lstrip()
    return chosen.startswith("Human:") and HH_TURN.search("\n\n" + chosen) is not None


@schema(PREFERENCES, "answers to a conversation", "conversations", "chosen", "rejected", optional=BESIDE)
def _from_answers_to_a_conversation(fields: Fields) -> Sides:
    """`{"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}`, as LLaMA-Factory has it."""
    prompt = read_messages(fields["conversations"], "conversations")
    chosen, rejected = (side(fields[name], name, "assistant") for name in ("chosen", "rejected"))
    return prompt, chosen, rejected


@schema(PREFERENCES, "", "completion", "label")
@schema(PREFERENCES, "", "conversations", "kto_tag")
@schema(PREFERENCES, "", "messages", "kto_tag")
def _refuse_unpaired(fields: Fields) -> Sides:
    raise RowError("an unpaired preference row: dpo needs a chosen and a rejected answer to the same prompt")


@schema(PREFERENCES, "", "prompt", "completions", "labels")
def _refuse_stepwise(fields: Fields) -> Sides:
    raise RowError("fields 'completions' and 'labels': steps with labels, which are for reward models")


@schema(PREFERENCES, "OASST trees", "prompt", optional=TREE, several=True, condition=is_tree)
def _from_tree(fields: Fields) -> list[Sides]:
    """The best-ranked answer of each set of siblings against each of the others."""
    return list(ranked_pairs(fields["prompt"]))


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
    def _from_comparison(fields: Fields) -> list[Sides]:
        better = _verdict(fields)
        if better == 0:
            return []
        if "prompt" in fields:
            prompt = side(fields["prompt"], "prompt", "user")
        elif "instruction" in fields:
            prompt = alpaca_prompt(fields)
        else:
            prompt = [turn("user", string(fields, "input"))] if "input" in fields else []
        if not prompt:
            raise RowError("no field 'prompt', 'instruction' or 'input'")
        answers = [side(fields[name], name, "assistant") for name in (first, second)]
        return [(prompt, answers[better - 1], answers[2 - better])]


for _names in ANSWERS:
    _compared(*_names)


def _verdict(fields: Fields) -> int:
    """1 or 2 for the better answer, 0 for a tie."""
    votes = [fields[name] for name in VERDICTS if fields.get(name) is not None]
    if not votes:
        raise RowError(f"no field {', '.join(map(repr, VERDICTS[:2]))} with the number of the better answer")
    numbers = [int(vote) if isinstance(vote, str) and vote.strip() in ("0", "1", "2") else vote for vote in votes]
    if not all(type(number) is int and number in (0, 1, 2) for number in numbers):
        raise RowError("the number of the better answer is not 1 or 2, or 0 for a tie")
    (better, count), *others = Counter(numbers).most_common()
    return 0 if others and others[0][1] == count else better


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
    condition=lambda fields: isinstance(fields["prompt"], (str, list)),
)
def _from_prompt_and_strings(fields: Fields) -> Sides:
    """The prompt is a string, a string of hh-rlhf turns, or a list of messages."""
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        return read_messages(prompt, "prompt"), *_answers(fields)
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
