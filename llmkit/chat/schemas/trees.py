"""Conversation trees of OpenAssistant, nested in one row or as flat messages on many lines.

    {"message_tree_id", "tree_state", "prompt": {"text", "role": "prompter", "replies": [{..., "rank": 0, "replies"}]}}
    {"message_id", "parent_id", "text", "role": "prompter" or "assistant", "rank"}      one message per line

Rank 0 is the best of several answers to one question.

Fine-tuning takes every path on which each answer is the best of its siblings. Of answers without any rank all are
taken, since nothing tells them apart; so are all follow-up questions, which annotators do not rank. Paths share their
beginnings, so an answer is trained on the first path with it, and is context on the others; otherwise the first answer
of a tree would count once for every leaf. A question without an answer ends its path before it.

Preferences pair the best answer with each of its lower-ranked siblings, at every question of the tree. Pairs of
adjacent ranks would be as many, but annotators agree least on neighbouring ranks, and every answer but the worst would
be made more probable once. All ordered pairs would give large groups of siblings a quadratic weight.

Left out with all their replies, and counted: deleted messages, those that a review refused (`review_result: false`) or
did not reach (null), and trees that were aborted or halted by a moderator.

Memory: flat messages are held until the end of their file, since a reply may stand anywhere in it; 4 times the bytes
of their lines (measured: 151 MB for 46,680 messages in 38 MB, 2026-12-01). A tree has at most MAX_DEPTH levels. The
work is linear in the messages, apart from the paths, which copy references to the messages above each leaf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.chat.messages import ROLES, Messages, RowError, turn
from llmkit.chat.schemas.table import Fields, LeftOut, Unused
from llmkit.io.documents import BadLine, Document, DocumentReader

TREE_FIELDS = ("message_tree_id", "tree_state")  # beside the prompt of a tree
MESSAGE_FIELDS = ("message_id", "parent_id", "text", "role", "rank")  # of flat messages
READ = {*TREE_FIELDS, *MESSAGE_FIELDS, "replies", "deleted", "review_result"}
ENDED = ("aborted_low_grade", "halted_by_moderator")  # tree_state
MAX_DEPTH = 400
Sides = tuple[Messages, Messages, Messages]  # prompt, better answer, other answer


@dataclass(slots=True, eq=False)
class Node:
    """One message of a tree, with its rank among its siblings (0 is the best; None: not ranked)."""

    message: dict[str, Any]
    rank: float | None
    replies: list[Node] = field(default_factory=list)

    @property
    def is_answer(self) -> bool:
        return bool(self.message["role"] == "assistant")


@dataclass(slots=True)
class Tree:
    """The messages of a tree that can be used (`root` is None if it has none), and what was left out."""

    root: Node | None
    notes: list[LeftOut | Unused]


def is_tree(fields: Fields) -> bool:
    """Whether `prompt` is the first message of a tree."""
    prompt = fields["prompt"]
    return isinstance(prompt, dict) and "text" in prompt and "role" in prompt


def read_tree(fields: Fields) -> Tree:
    """The tree in a row. RowError names the path to a malformed message."""
    notes: list[LeftOut | Unused] = []
    if fields.get("tree_state") in ENDED:
        return Tree(None, [LeftOut("aborted trees")])
    unused: dict[str, None] = {}
    top = Node({}, None)
    stack: list[tuple[Any, str, int, Node]] = [(fields["prompt"], "prompt", 1, top)]
    while stack:
        item, where, depth, parent = stack.pop()
        node = _node(item, where)
        if item.get("deleted") or not item.get("review_result", True):
            notes.append(LeftOut("deleted or unreviewed messages, with their replies"))
            continue
        if depth > MAX_DEPTH:
            raise RowError(f"the tree has more than {MAX_DEPTH} levels")
        parent.replies.append(node)
        unused |= dict.fromkeys(name for name in item if name not in READ)
        replies = item.get("replies") or []
        if not isinstance(replies, list):
            raise RowError(f"{where}.replies is not a list of messages")
        stack += [(reply, f"{where}.replies[{i}]", depth + 1, node) for i, reply in reversed([*enumerate(replies)])]
    return Tree(top.replies[0] if top.replies else None, notes + [Unused(name) for name in unused])


def _node(item: Any, where: str) -> Node:
    if not isinstance(item, dict):
        raise RowError(f"{where} is not an object")
    if not isinstance(item.get("text"), str):
        raise RowError(f"{where}.text is not a string")
    role, rank = item.get("role"), item.get("rank")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r:.60} (prompter or assistant)")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
        raise RowError(f"{where}.rank is not a number")
    return Node(turn(ROLES[role], item["text"]), rank)


def best_paths(tree: Tree) -> Iterator[Messages | LeftOut]:
    """The conversations for fine-tuning, in the order of the tree; an answer of an earlier one has `train: False`."""
    trained: set[Node] = set()
    stack: list[tuple[Node, list[Node]]] = [(tree.root, [])] if tree.root else []
    lower = unanswered = 0
    while stack:
        node, before = stack.pop()
        path = [*before, node]
        following, left_out = _best(node.replies)
        lower += left_out
        stack += [(reply, path) for reply in reversed(following)]
        if following:
            continue
        unanswered += not node.is_answer
        while path and not path[-1].is_answer:
            path.pop()
        if all(node in trained for node in path if node.is_answer):
            continue
        yield [node.message | {"train": False} if node in trained else node.message for node in path]
        trained.update(node for node in path if node.is_answer)
    if lower:
        yield LeftOut("lower-ranked answers, with their replies", lower)
    if unanswered:
        yield LeftOut("questions without an answer", unanswered)


def _best(replies: list[Node]) -> tuple[list[Node], int]:
    """The replies that a path follows, and the number of the others."""
    best = min((reply.rank for reply in replies if reply.rank is not None and reply.is_answer), default=None)
    kept = [reply for reply in replies if not reply.is_answer or reply.rank == best]
    return kept, len(replies) - len(kept)


def ranked_pairs(tree: Tree) -> Iterator[Sides | LeftOut]:
    """(prompt, best answer, a lower-ranked answer) for all ranked siblings, in the order of the tree."""
    stack: list[tuple[Node, Messages]] = [(tree.root, [])] if tree.root else []
    while stack:
        node, before = stack.pop()
        path = [*before, node.message]
        stack += [(reply, path) for reply in reversed(node.replies)]
        answers = [reply for reply in node.replies if reply.is_answer]
        if len(answers) < 2:
            continue
        ranked = sorted((a for a in answers if a.rank is not None), key=lambda answer: answer.rank or 0)
        if len(answers) > len(ranked):
            yield LeftOut("answers without a rank", len(answers) - len(ranked))
        for other in ranked[1:]:
            if other.rank == ranked[0].rank:
                yield LeftOut("ties")
            elif other.message == ranked[0].message:
                yield LeftOut("pairs of equal answers")
            else:
                yield path, [ranked[0].message], [other.message]


# ---- flat messages


def is_flat_message(fields: Fields) -> bool:
    """Whether a row is one message of a tree."""
    return all(isinstance(fields.get(name), str) for name in ("message_id", "text", "role")) and "replies" not in fields


class FlatMessages:
    """The flat messages of one file, until it ends."""

    def __init__(self, reader: DocumentReader) -> None:
        self._reader = reader
        self._messages: dict[str, tuple[Document, Fields]] = {}

    def add(self, document: Document, fields: Fields) -> None:
        """Hold a message. One whose id has been seen in the file is a bad line."""
        name = fields["message_id"]
        if name in self._messages:
            line = self._messages[name][0].line
            self._refuse(document, f"field 'message_id': {name!r:.60} is also on line {line}")
        else:
            self._messages[name] = document, fields

    def trees(self) -> Iterator[tuple[list[Document], Fields]]:
        """The rows of the trees in the order of their first messages, each with its lines; nothing is held afterwards.

        A message whose parent is not in the file, or that leads to no first message, is a bad line.
        """
        messages, self._messages = self._messages, {}
        replies: dict[str, list[str]] = {}
        roots = []
        for name, (_, fields) in messages.items():
            parent = fields.get("parent_id")
            if parent is None:
                roots.append(name)
            elif isinstance(parent, str):
                replies.setdefault(parent, []).append(name)
        reached = set(roots)
        for root in roots:
            names = [root]
            for name in names:  # grows
                names += replies.get(name, [])
            reached.update(names)
            nodes = {name: dict(messages[name][1]) for name in names}
            for name in names:
                nodes[name]["replies"] = [nodes[reply] for reply in replies.get(name, [])]
            beside = {name: nodes[root][name] for name in TREE_FIELDS if name in nodes[root]}
            documents = sorted((messages[name][0] for name in names), key=lambda document: document.line)
            yield documents, {"prompt": nodes[root]} | beside
        for name, (document, fields) in messages.items():
            if name not in reached:
                self._refuse(document, _fault(fields.get("parent_id"), messages))

    def _refuse(self, document: Document, reason: str) -> None:
        self._reader.accept([BadLine(document.file, document.line, reason, document.raw)])


def _fault(parent: Any, messages: Mapping[str, Any]) -> str:
    if isinstance(parent, str) and parent in messages:
        return "field 'parent_id': the messages above do not lead to the first message of a tree in this file"
    return f"field 'parent_id': no message {parent!r:.60} in this file"
