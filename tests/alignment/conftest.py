"""The tokenizer, templates and model of `chat_fixtures`."""

from chat_fixtures import base, files, templates  # noqa: F401  (fixtures)
