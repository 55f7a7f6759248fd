"""Schemas of rows. Importing this registers them all."""

from llmkit.chat.schemas import conversations, preferences

__all__ = ["conversations", "preferences"]
