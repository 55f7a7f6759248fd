"""Deduplication: which documents are the same (exact.py, minhash.py) and which of them stay (exact.Stream in one pass, groups.py in two); repeats cut out of
texts (passages.py, substring.py)."""
