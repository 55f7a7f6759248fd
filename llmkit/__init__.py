"""llmkit: the whole language-model pipeline as composable Unix commands."""

__version__ = "0.1.0"
