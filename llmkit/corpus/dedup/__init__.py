"""Deduplication: one pass (`method.Deduplicator`) over documents, and the methods that tell duplicates, one file each.

A method registers itself in `METHODS`; to add one, write a file here with a class that has `measure` (workers) and `memory` (main process).
"""

from llmkit.corpus.dedup import exact, minhash
from llmkit.corpus.dedup.method import METHODS, Deduplicator, Match

__all__ = ["METHODS", "Deduplicator", "Match", "exact", "minhash"]
