"""Trees of messages with ranked answers, as OpenAssistant exports them: paths for fine-tuning, pairs of answers.

A message has `role` (prompter or assistant), `text`, `replies`, and `rank`, 0 for the best of siblings. Deleted
messages, and those that reviewers refused, are left out with their replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.chat.messages import ROLES, Messages, RowError, turn

TREE = ("message_tree_id", "tree_state")  # fields beside a tree
MESSAGE = ("message_id", "parent_id", "text", "role")  # fields of a message in a row of its own
MOST_DEEP = 200
Sides = tuple[Messages, Messages, Messages]
Node = Mapping[str, Any]


def is_tree(fields: Node) -> bool:
    """Whether the prompt of a row is a message with replies."""
    return isinstance(fields["prompt"], Mapping) and "replies" in fields["prompt"]


def best_paths(root: Node) -> list[Messages]:
    """The conversations of a tree: all branches of the user, the best-ranked answer to each. What two of them have in
    common is trained in the first.
    """
    paths: list[Messages] = []
    seen: set[int] = set()
    rest: list[tuple[Node, list[Node]]] = [(root, [])]
    while rest:
        node, before = rest.pop()
        path = [*before, node]
        replies = _replies(node, len(path))
        if _role(node) == "user":
            replies = replies[:1]
        whole = path if _role(node) == "assistant" else before
        if not replies and any(id(item) not in seen for item in whole):
            paths.append([_message(item, trained=id(item) not in seen) for item in whole])
            seen |= {id(item) for item in whole}
        rest += [(reply, path) for reply in reversed(replies)]
    return paths


def ranked_pairs(root: Node) -> Iterator[Sides]:
    """For each message of the user, the best-ranked answer against each of the others."""
    rest: list[tuple[Node, list[Node]]] = [(root, [])]
    while rest:
        node, before = rest.pop()
        path = [*before, node]
        replies = _replies(node, len(path))
        if _role(node) == "user":
            ranked = [reply for reply in replies if isinstance(reply.get("rank"), int)]
            for other in ranked[1:]:
                if other["rank"] != ranked[0]["rank"] and other.get("text") != ranked[0].get("text"):
                    yield [_message(item) for item in path], [_message(ranked[0])], [_message(other)]
        rest += [(reply, path) for reply in reversed(replies)]


def joined(messages: list[Node]) -> tuple[Node | None, list[Node]]:
    """The tree of messages in rows of their own, and those that are in none: their parent, or its, is missing."""
    nodes = {message["message_id"]: dict(message) | {"replies": []} for message in messages}
    root = next((node for node in nodes.values() if node.get("parent_id") is None), None)
    for node in nodes.values():
        if node.get("parent_id") in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    reached, rest = set(), [root] if root else []
    while rest:
        node = rest.pop()
        reached.add(node["message_id"])
        rest += node["replies"]
    return root, [message for message in messages if message["message_id"] not in reached]


def _replies(node: Node, depth: int) -> list[Node]:
    """The replies that count, the best-ranked first; those without a rank follow in their order."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError("'replies' is not a list of messages")
    if depth >= MOST_DEEP and replies:
        raise RowError(f"a tree of more than {MOST_DEEP} messages in a row")
    kept = [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]
    return sorted(kept, key=lambda reply: reply["rank"] if type(reply.get("rank")) is int else 1 << 30)


def _role(node: Node) -> str:
    role = node.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"unknown role {role!r:.60} (known: {', '.join(ROLES)})")
    return ROLES[role]


def _message(node: Node, trained: bool = True) -> dict[str, Any]:
    text = node.get("text")
    if not isinstance(text, str):
        raise RowError("a message of the tree has no text")
    message = turn(_role(node), text)
    return message if trained or message["role"] != "assistant" else message | {"train": False}
