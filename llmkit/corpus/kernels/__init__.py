"""Compiled text kernels: what rules measure, in loops over UTF-8 bytes that numba compiles on first use and caches.

Every kernel takes a text as `uint8[bytes]` (valid UTF-8) and the table of character classes (`characters.classes()`); lengths that they return
are in characters. One signature each, so that little is compiled.
"""
