"""Text to better text: words, quality filters, presets, deduplication. Nothing here imports torch."""
