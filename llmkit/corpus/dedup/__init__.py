"""Deduplication: what makes two documents the same (exact.py, minhash.py), and which of them stay (exact.Stream in one pass, groups.py in two)."""
