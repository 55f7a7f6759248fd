"""Candidate pairs from equal band keys, and the choice of survivors among duplicates, compiled.

Documents are numbered by rank, the order in which they are preferred as survivors. Candidate pairs are packed in
`uint64`: the later document in the upper 32 bits, the earlier one in the lower.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llmkit.corpus.dedup.kernels.minhash import jaccard
from llmkit.kernels import kernel

NONE = -1  # no match
S32, LOW_32 = np.uint64(32), np.uint64(0xFFFFFFFF)


@kernel
def firsts(keys, order, result):  # type: ignore[no-untyped-def]
    """Set result[i] to the lowest document with the key of document i; `order` sorts `keys`, equal ones by rank."""
    for i in range(len(order)):
        same = i > 0 and keys[order[i]] == keys[order[i - 1]]
        result[order[i]] = result[order[i - 1]] if same else order[i]


@njit(cache=True, nogil=True)
def pairs(keys, documents, limit):  # type: ignore[no-untyped-def]
    """Candidate pairs of `documents` with equal keys; both arrays are sorted by key, then rank.

    Each document is paired with the first `limit` documents of its key and with the `limit` before it, so that the cost
    is linear however many documents share a key.
    """
    total = 0
    result = np.empty(0, np.uint64)
    for fill in range(2):
        total = start = 0
        for i in range(1, len(keys)):
            if keys[i] != keys[i - 1]:
                start = i
                continue
            later = np.uint64(documents[i]) << S32
            near = max(start, i - limit)
            for j in range(near, i):
                if fill:
                    result[total] = later | np.uint64(documents[j])
                total += 1
            for j in range(start, min(near, start + limit)):
                if fill:
                    result[total] = later | np.uint64(documents[j])
                total += 1
        if not fill:
            result = np.empty(total, np.uint64)
    return result


@kernel
def similarity_of(i, j, shingles, starts, threshold):  # type: ignore[no-untyped-def]
    """Jaccard similarity of the shingles of two documents, shingles[starts[i]:starts[i + 1]].

    0 if the sizes of the two sets alone put it below the threshold.
    """
    a, b = shingles[starts[i] : starts[i + 1]], shingles[starts[j] : starts[j + 1]]
    if min(len(a), len(b)) < threshold * max(len(a), len(b)) - 1e-9:
        return 0.0
    return jaccard(a, b)


@njit(cache=True, nogil=True)
def similarities_of(later, earlier, shingles, starts, threshold):  # type: ignore[no-untyped-def]
    """`similarity_of` for each pair."""
    result = np.empty(len(later))
    for p in range(len(later)):
        result[p] = similarity_of(later[p], earlier[p], shingles, starts, threshold)
    return result


@njit(cache=True, nogil=True)
def stars(  # type: ignore[no-untyped-def]
    first_rank,
    end,
    references,
    exact,
    same,
    candidates,
    known,
    documents,
    shingles,
    starts,
    threshold,
    matches,
    similarities,
    reasons,
    kept_exact,
    kept_same,
    near,
    near_similarity,
    searched,
):
    """Choose survivors among the ranks from `first_rank` to `end`: a document is removed if it matches a survivor.

    Writes for each document the first survivor that it matches (`matches`, NONE: it survives), their similarity
    (`similarities`) and the reason (`reasons`, 1: equal key, 2: equal or similar text). Entries of `matches` that are
    already set stay, with their reasons: duplicates of indexed documents. The first `references` documents always
    survive.

    `exact`, `same`: lowest document with the same key, with the same words (empty: not compared).
    `known`: similarity of each candidate; if empty, similarities are measured as needed, from the `shingles` of the
    document at rank i, which has the number documents[i] in `starts`. With threshold < 0, candidates are accepted
    unverified (similarity -1).

    State carried from one call to the next, indexed by the lowest document with a key or with the same words:
    `kept_exact`: the survivor with this key; `kept_same`: the survivor with these words; `near`: the survivor similar
    to these words (each NONE: none yet); `near_similarity`: its similarity; `searched`: whether `near` was searched.
    """
    for i in range(first_rank, end):
        if i >= references and matches[i] == NONE:
            if len(exact) and exact[i] >= 0 and kept_exact[exact[i]] >= 0:
                matches[i], similarities[i], reasons[i] = kept_exact[exact[i]], 1, 1
            elif len(same):
                first = same[i]
                if kept_same[first] < 0 and not searched[first]:
                    searched[first] = True
                    p = np.searchsorted(candidates, np.uint64(first) << S32)
                    while p < len(candidates) and np.int64(candidates[p] >> S32) == first:
                        earlier = np.int64(candidates[p] & LOW_32)
                        p += 1
                        if kept_same[earlier] < 0:
                            continue
                        similarity = -1.0
                        if threshold >= 0:
                            if len(known):
                                similarity = known[p - 1]
                            else:
                                similarity = similarity_of(
                                    documents[first], documents[earlier], shingles, starts, threshold
                                )
                            if similarity < threshold:
                                continue
                        near[first], near_similarity[first] = kept_same[earlier], similarity
                        break
                if kept_same[first] >= 0:
                    matches[i], similarities[i], reasons[i] = kept_same[first], 1, 2
                elif near[first] >= 0:
                    matches[i], similarities[i], reasons[i] = near[first], near_similarity[first], 2
        if matches[i] == NONE:
            if len(exact) and exact[i] >= 0 and kept_exact[exact[i]] < 0:
                kept_exact[exact[i]] = i
            if len(same) and kept_same[same[i]] < 0:
                kept_same[same[i]] = i


@kernel
def find_root(parents, i):  # type: ignore[no-untyped-def]
    """The lowest document in the component of i."""
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


@njit(cache=True, nogil=True)
def components(  # type: ignore[no-untyped-def]
    references, exact, same, candidates, known, threshold, matches, similarities, reasons
):
    """Choose survivors by union-find: the first document of each connected component of verified pairs survives.

    Arguments and results as for `stars`.
    """
    n = len(matches)
    parents = np.arange(n)
    for i in range(n):
        for first in (exact[i] if len(exact) else NONE, same[i] if len(same) else NONE):
            if first >= 0 and first != i:
                a, b = find_root(parents, i), find_root(parents, first)
                parents[max(a, b)] = min(a, b)
    for p in range(len(candidates)):
        later, earlier = np.int64(candidates[p] >> S32), np.int64(candidates[p] & LOW_32)
        if threshold >= 0 and known[p] < threshold:
            continue
        a, b = find_root(parents, later), find_root(parents, earlier)
        parents[max(a, b)] = min(a, b)
    for i in range(references, n):
        root = find_root(parents, i)
        if root == i or matches[i] != NONE:
            continue
        matches[i], reasons[i], similarities[i] = root, 2, -1  # it may be similar only to another member
        if len(exact) and exact[i] >= 0 and exact[i] == exact[root]:
            reasons[i], similarities[i] = 1, 1
        elif len(same) and same[i] == same[root]:
            similarities[i] = 1
