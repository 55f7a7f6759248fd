"""Deduplication.

Which documents are duplicates: exact.py, minhash.py. Which of them survive: `exact.StreamingDedup` in one pass,
`two_pass.TwoPassDedup` in two. Repeats cut out of texts: passages.py, substring.py.
"""
