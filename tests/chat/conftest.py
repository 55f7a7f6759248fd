"""The tokenizer and templates of `chat_fixtures`."""

from chat_fixtures import files, templates  # noqa: F401  (fixtures)
