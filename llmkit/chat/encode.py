"""Rows of a file to token ids with loss weights: the training data of `sft` and `dpo`.

A row longer than the context is dropped, or with `too_long="truncate"` cut at its end (the model then does not
learn to stop there), with "truncate-turns" after the last trained turn that fits (so that every turn is learnt
with its end), and dropped if the cut leaves nothing to learn; all are counted. With "error" it is a bad row, as is
one without any trained token, which almost always means that its roles are not the expected ones: an error that
names file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmkit.chat.control_tokens import hide
from llmkit.chat.fidelity import NAMED
from llmkit.chat.masks import EncodedRow, Span, encode_chat, encode_spans, is_trained
from llmkit.chat.messages import Messages, RowError
from llmkit.chat.rows import (
    NO_NAMES,
    Conversation,
    Converted,
    Preference,
    listed,
    read_rows,
    to_conversations,
    to_preferences,
)
from llmkit.chat.templates import DamagedTemplateError, chat_template, special_contents, special_tokens
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import DocumentReader

COUNTS = ("rows", "too_long", "dropped", "left_out", "row_tokens", "trained")
TRUNCATE_TURNS = "truncate-turns"
TOO_LONG = ("drop", "truncate", TRUNCATE_TURNS, "error")
Encode = Callable[[Mapping[str, Any]], Converted[EncodedRow]]  # from the fields of a row
TRAIN_ON = ("all", "last", "turns")
MESSAGE_FIELDS = (
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "train",
    "weight",
)  # of which llmkit knows the meaning; a template may read more


@dataclass(slots=True)
class EncodedDataset:
    """Encoded rows, and counts for the summary. A preference pair is two rows: chosen, rejected."""

    rows: list[EncodedRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    unused: Counter[str] = field(default_factory=Counter)  # rows by the names of their fields that are not used
    left_out: Counter[str] = field(default_factory=Counter)  # valid parts of rows that are not used, such as ties
    lost: Counter[str] = field(default_factory=Counter)  # rows by what the chat template does not show of them

    def add(self, *rows: EncodedRow) -> None:
        """Add one row, or the two rows of a pair."""
        self.rows += rows
        self.counts["rows"] += 1
        self.counts["row_tokens"] += sum(len(row.tokens) for row in rows)
        self.counts["trained"] += sum(row.trained for row in rows)
        self.lost.update({field for row in rows for field in row.lost})

    def add_fitting(self, rows: list[EncodedRow], context: int, too_long: str) -> None:
        """Add one row, or the two rows of a pair, as `fitting_rows` returns them; if it drops them, count them."""
        fitting = fitting_rows(rows, context, too_long)
        self.counts["too_long"] += max(len(row.tokens) for row in rows) > context
        if fitting:
            self.add(*fitting)
        else:
            self.counts["dropped"] += 1

    def extend(self, other: EncodedDataset) -> None:
        """Add the rows of another one, and its counts."""
        self.rows += other.rows
        for name, count in other.counts.items():
            self.counts[name] += count
        for mine, others in ((self.unused, other.unused), (self.left_out, other.left_out), (self.lost, other.lost)):
            mine.update(others)

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, weights) of each row."""
        return [(row.tokens, row.weights) for row in self.rows]


@dataclass(frozen=True)
class RowEncoding:
    """How rows become training data: `encode`, and what happens to those of over `context` tokens. `names` as in
    `read_rows`; `together` encoded rows are kept or dropped together. `identity` is all that decides what `encode`
    returns, and has a repr of its own for each value.
    """

    encode: Encode
    context: int
    too_long: str = "drop"
    names: Mapping[str, str] = field(default_factory=dict)
    together: int = 1
    identity: Any = None

    def read(self, reader: DocumentReader) -> EncodedDataset:
        """Every row of `reader`."""
        return self.dataset(rows for _, rows in read_rows(reader, self.encode, self.names))

    def read_all(self, reader: DocumentReader) -> EncodedDataset:
        """Every row of `reader`; LlmkitError if no row is left."""
        encoded = self.read(reader)
        self.refuse_empty(encoded)
        return encoded

    def dataset(self, encoded: Iterable[Converted[EncodedRow]]) -> EncodedDataset:
        """What `encode` made of every row."""
        result = EncodedDataset()
        for rows in encoded:
            result.unused.update(rows.unused)
            result.left_out += rows.left_out
            for start in range(0, len(rows), self.together):
                result.add_fitting(rows[start : start + self.together], self.context, self.too_long)
        result.counts["left_out"] = result.left_out.total()
        return result

    def refuse_empty(self, encoded: EncodedDataset) -> None:
        """LlmkitError if no row is left."""
        if encoded.rows:
            return
        long = encoded.counts["too_long"]
        if encoded.left_out and not long:
            raise LlmkitError(f"no rows to train on; left out: {listed(encoded.left_out)}", "check the inputs")
        if not long:
            raise LlmkitError("no rows were read", "check the inputs")
        reason = f"all {long:,} rows are longer than {self.context:,} tokens"
        if self.too_long == "drop":
            raise LlmkitError(reason, "use --too-long truncate to cut them")
        in_turns = self.too_long == TRUNCATE_TURNS
        hint = "--too-long truncate also cuts within a turn" if in_turns else "use a model with a longer context"
        raise LlmkitError(f"{reason}, and the cut leaves nothing to learn", hint)


def encode_conversations(
    reader: DocumentReader, files: Mapping[str, str], context: int, **options: Any
) -> EncodedDataset:
    """Every row of `reader` for fine-tuning, with at most `context` tokens; `options` are those of `row_encoding`.
    Raises LlmkitError if no row is left.
    """
    return row_encoding(files, context, **options).read_all(reader)


def row_encoding(
    files: Mapping[str, str],
    context: int,
    *,
    too_long: str = "drop",
    template: bool = True,
    train_on: str = "all",
    lossy: bool = False,
    names: Mapping[str, str] = NO_NAMES,
) -> RowEncoding:
    """How conversations become training data. `names`: the names that fields have in the rows, by those here."""
    encode = bounded(row_encoder(files, template=template, train_on=train_on, lossy=lossy), context, too_long)
    identity = _identity("conversations", files, names, context, too_long, template, train_on, lossy)
    return RowEncoding(encode, context, too_long, names, identity=identity)


def _identity(
    kind: str, files: Mapping[str, str], names: Mapping[str, str], context: int, too_long: str, *options: Any
) -> Any:
    limit = context if too_long == "error" else None  # other ways keep the rows as they are until later
    return kind, sorted(files.items()), sorted(names.items()), limit, options


def row_encoder(
    files: Mapping[str, str],
    *,
    template: bool = True,
    train_on: str = "all",
    lossy: bool = False,
) -> Encode:
    """A function of the fields of a row: its encoded rows, one for each part that `train_on` makes of its
    conversations. It raises RowError.
    """
    if train_on not in TRAIN_ON:
        raise UsageError(f"--train-on {train_on!r}", "one of: " + ", ".join(TRAIN_ON))

    def parts(row: Conversation) -> list[EncodedRow]:
        return [encode_conversation(part, files, lossy) for part in trained_parts(row, train_on)]

    def encode(fields: Mapping[str, Any]) -> Converted[EncodedRow]:
        conversations = to_conversations(fields, template)
        encoded = conversations.each(parts)
        encoded.unused += _unused_fields(conversations, files)
        return encoded

    return encode


def _unused_fields(conversations: Iterable[Conversation], files: Mapping[str, str]) -> list[str]:
    """The fields of messages that neither llmkit reads nor the chat template names."""
    names = dict.fromkeys(
        name for row in conversations if row.text is None for message in row.messages for name in message
    )
    rest = [name for name in names if name not in MESSAGE_FIELDS]
    texts = [chat_template(files, tools) or "" for tools in (False, True)] if rest else []
    return [f"messages.{name}" for name in rest if not any(name in text for text in texts)]


def encode_preferences(
    reader: DocumentReader, files: Mapping[str, str], context: int, **options: Any
) -> EncodedDataset:
    """Every pair of `reader`, as `encode_conversations`; `options` are those of `pair_encoding`."""
    return pair_encoding(files, context, **options).read_all(reader)


def pair_encoding(
    files: Mapping[str, str],
    context: int,
    *,
    too_long: str = "drop",
    lossy: bool = False,
    names: Mapping[str, str] = NO_NAMES,
) -> RowEncoding:
    """How preference pairs become training data: chosen and rejected, each after the prompt, with weights on the
    assistant messages after it."""
    if too_long == TRUNCATE_TURNS:
        raise UsageError(f"--too-long {too_long} is for sft", "a pair compares whole answers: drop, truncate or error")

    def encode_pair(row: Preference) -> list[EncodedRow]:
        prompt: Messages = [message | {"train": False} for message in row.prompt]
        sides = (Conversation(prompt + side, row.tools) for side in (row.chosen, row.rejected))
        return [encode_conversation(side, files, lossy) for side in sides]

    encode = bounded(lambda fields: to_preferences(fields).each(encode_pair), context, too_long)
    identity = _identity("pairs", files, names, context, too_long, lossy)
    return RowEncoding(encode, context, too_long, names, together=2, identity=identity)


def bounded(encode: Encode, context: int, too_long: str) -> Encode:
    """`encode`, which with `too_long` error raises RowError for a row over the context."""
    if too_long not in TOO_LONG:
        raise UsageError(f"--too-long {too_long!r}", "one of: " + ", ".join(TOO_LONG))

    def bounded(fields: Mapping[str, Any]) -> Converted[EncodedRow]:
        rows = encode(fields)
        longest = max((len(row.tokens) for row in rows), default=0)
        if longest > context:
            raise RowError(f"{longest:,} tokens, but a sequence has {context:,} (see --too-long and --sequence-length)")
        return rows

    return bounded if too_long == "error" else encode


def encode_conversation(row: Conversation, files: Mapping[str, str], lossy: bool = False) -> EncodedRow:
    """Token ids and weights of one row; plain text gets an end-of-text token. Raises RowError if no token would
    be trained, and without `lossy` if the template does not show a part of the conversation.
    """
    if row.text is None:
        _refuse_empty_answers(row.messages)
        try:
            encoded = encode_chat(row.messages, files, row.tools, lossy)
            answers = [m["content"] for m in row.messages if m["role"] == "assistant" and is_trained(m)]
        except (DamagedTemplateError, RowError):
            raise
        except LlmkitError as error:
            raise RowError(f"{error.message} ({error.hint})") from error
    else:
        answers = [row.text]
        (before, after), marker = hide((row.text[: row.start], row.text[row.start :]), files)
        bare = encode_spans(before + after, [Span(len(before), len(before + after))], files, marker)
        encoded = EncodedRow(
            np.append(bare.tokens, np.int32(_end_of_text(files))), np.append(bare.weights, np.float32(1))
        )
    if not encoded.trained:
        raise RowError("nothing to learn: no assistant message, or its weight is 0")
    controls = tuple(special_contents(files))
    spelled = row.text is not None and not row.start and any(name in row.text for name in controls)  # a rendered chat
    if spelled or any(answer.rstrip().endswith(controls) for answer in answers):
        return replace(encoded, lost=(*encoded.lost, NAMED))
    return encoded


def trained_parts(row: Conversation, train_on: str) -> list[Conversation]:
    """The row with the turns that are trained on; for "turns" each of them as the last of a conversation."""
    if row.text is not None or train_on == "all":
        return [row]
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    parts = []
    for i in turns if train_on == "turns" else turns[-1:]:
        before = [message | {"train": False} for message in row.messages[:i]]
        after = row.messages[i + 1 :] if train_on == "last" else []
        if is_trained(row.messages[i]):
            parts.append(replace(row, messages=[*before, row.messages[i], *after]))
    return parts or [replace(row, messages=[message | {"train": False} for message in row.messages])]


def _refuse_empty_answers(messages: Messages) -> None:
    """RowError for an answer of which only the stop token would be trained."""
    for number, message in enumerate(messages):
        trained = message["role"] == "assistant" and is_trained(message)
        empty = (
            not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content")
        )
        if trained and empty:
            raise RowError(f"message {number + 1} is an empty answer")


def fitting_rows(rows: list[EncodedRow], context: int, too_long: str) -> list[EncodedRow]:
    """The rows, cut to at most `context` tokens as `too_long` demands; [] if one has to be dropped, or its trained
    tokens were cut off.
    """
    if all(len(row.tokens) <= context for row in rows):
        return rows
    if too_long == "drop":
        return []
    cut = [_cut(row, _turns_end(row, context) if too_long == TRUNCATE_TURNS else context) for row in rows]
    return cut if all(row.trained for row in cut) else []


def _cut(row: EncodedRow, stop: int) -> EncodedRow:
    return replace(row, tokens=row.tokens[:stop], weights=row.weights[:stop])


def _turns_end(row: EncodedRow, context: int) -> int:
    """The number of tokens up to the end of the last trained turn that ends within `context`; 0 if none does."""
    if len(row.tokens) <= context:
        return len(row.tokens)
    is_trained = row.weights[: context + 1] != 0
    ends = np.flatnonzero(is_trained[:-1] & ~is_trained[1:])
    return int(ends[-1]) + 1 if len(ends) else 0


def _end_of_text(files: Mapping[str, str]) -> int:
    name = special_tokens(files).get("eos_token", "")
    ids = special_contents(files)
    if name not in ids:
        raise RowError("the tokenizer has no end-of-text token, which has to follow plain text")
    return ids[name]
