"""Near-duplicate texts by MinHash and locality-sensitive hashing, on whole arrays at a time.

A text is the set of its words and pairs of neighbouring words. Two texts are near-duplicates when the weighted
Jaccard similarity of their sets, sum of min over sum of max, reaches SIMILAR. What many texts share (a prompt
template) weighs little: an element's weight falls from 1, where at most 5% of the texts have it, to 0, where half have.

    "Reverse this word: stone" / "Reverse this word: water"     share only the template: similarity 0
    "My card was stolen in Rome" / "my card was stolen in rome!!"                        similarity 1

Candidate pairs come from one-permutation hashing (Li, Owen, Zhang 2012) with rotation (Shrivastava, Li 2014): each
element falls into one of BINS bins, a bin keeps its smallest value. With the value -ln(u)/weight the smallest of two
sets agree with probability equal to their weighted Jaccard similarity. Each pair is then measured exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

SIMILAR = 0.7
BINS = 128
ROWS_IN_BAND = 4  # 32 bands of 4: a pair of similarity 0.7 is a candidate with probability 0.9998, of 0.3 with 0.23
NEIGHBOURS = 6  # candidates taken a text and band, so that the cost stays linear where many texts are alike
BATCH = 2_000
MOST_WORDS = 500_000  # remembered at once
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff"  # written without spaces: a character is a word
WORDS = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s.,;:!?'\"]")

Labels = npt.NDArray[np.int64]


class _WordHashes(dict[str, int]):
    """64-bit hashes of words, the same on every machine, each computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        self[word] = value
        return value


class ShingleSets:
    """The sets of all texts as one array: text i has `hashes[starts[i]:starts[i+1]]`, sorted, and their weights."""

    def __init__(self, hashes: npt.NDArray[np.uint32], starts: Labels) -> None:
        self.hashes, self.starts = hashes, starts
        self.count = len(starts) - 1
        self.weights = _rarity(hashes, self.count)  # [elements]


def cluster_texts(texts: Sequence[str]) -> Labels:
    """A cluster number for each text; near-duplicates (and their near-duplicates) share one. [texts]"""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(len(texts), dtype=np.int64)
    if len(texts) < 2:
        return labels
    sets = shingle_sets(texts)
    measure = _Jaccard(sets)
    for left, right in candidate_pairs(signatures(sets), labels):
        near = measure(left, right) >= SIMILAR
        if near.any():
            edges = (np.ones(near.sum(), np.int8), (labels[left[near]], labels[right[near]]))
            _, merged = connected_components(coo_matrix(edges, shape=(len(texts),) * 2), directed=False)
            labels[:] = merged[labels]
    return labels


def shingle_sets(texts: Iterable[str]) -> ShingleSets:
    """Words and word pairs of every text, hashed to 32 bits."""
    lookup = _WordHashes()
    stream = iter(texts)
    hashes: list[npt.NDArray[np.uint32]] = []
    sizes: list[Labels] = []
    while batch := list(islice(stream, BATCH)):
        words = [WORDS.findall(text) for text in batch]
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        flat = np.fromiter((lookup[word] for row in words for word in row), np.uint64, int(lengths.sum()))
        owner = np.repeat(np.arange(len(batch), dtype=np.uint64), lengths)
        singles = (flat * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        inside = owner[:-1] == owner[1:]
        pairs = ((flat[:-1] * np.uint64(0xD6E8FEB86659FD93) + flat[1:]) * np.uint64(0xA0761D6478BD642F)) >> np.uint64(
            32
        )
        keys = np.concatenate([owner << np.uint64(32) | singles, (owner[:-1] << np.uint64(32) | pairs)[inside]])
        keys = np.unique(keys)
        hashes.append(keys.astype(np.uint32))
        sizes.append(np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(batch)))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.zeros(0, np.int64)]))]).astype(np.int64)
    return ShingleSets(np.concatenate(hashes or [np.zeros(0, np.uint32)]), starts)


def _rarity(hashes: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.float32]:
    """Weight of each element by the number of texts that have it: 1 up to 5% of them, 0 from half of them on."""
    common, rare = max(0.5 * count, 8.0), max(0.05 * count, 4.0)
    places = hashes >> np.uint32(10)  # counted by 22 bits: a collision in a large set changes next to nothing
    frequency = np.bincount(places, minlength=2**22)
    with np.errstate(divide="ignore"):
        weight = np.log(common / frequency) / np.log(common / rare)
    return np.clip(weight, 0.0, 1.0).astype(np.float32)[places]


def signatures(sets: ShingleSets) -> npt.NDArray[np.uint32]:
    """MinHash signatures; all zero for a text without any element that counts. [texts, BINS]"""
    smallest = np.full((sets.count, BINS), np.inf, np.float32)
    for first in range(0, sets.count, BATCH):
        last = min(first + BATCH, sets.count)
        span = slice(sets.starts[first], sets.starts[last])
        owner = np.repeat(np.arange(first, last), np.diff(sets.starts[first : last + 1]))
        counts = sets.weights[span] > 0
        mixed = _mix(sets.hashes[span][counts])
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        value = (-np.log(uniform) / sets.weights[span][counts]).astype(np.float32)
        place = owner[counts] * BINS + (mixed & np.uint64(BINS - 1)).astype(np.int64)
        np.minimum.at(smallest.reshape(-1), place, value)
    return _fill_empty_bins(smallest)


def _mix(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = hashes.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fill_empty_bins(smallest: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """An empty bin borrows from the next one that isn't, marked with the distance."""
    filled = np.isfinite(smallest)
    codes = np.where(filled, smallest.view(np.uint32), 0).astype(np.uint32)
    carried = np.zeros(len(codes), np.uint32)
    for column in [*range(BINS - 1, -1, -1)] * 2:  # twice round the circle
        here = filled[:, column]
        carried = np.where(here, codes[:, column], carried + np.where(carried > 0, np.uint32(0x9E3779B1), np.uint32(0)))
        codes[:, column] = carried
    return codes


def candidate_pairs(codes: npt.NDArray[np.uint32], labels: Labels) -> Iterator[tuple[Labels, Labels]]:
    """For each band, pairs of texts that agree in it and have different labels when asked for."""
    rows = np.flatnonzero(codes.any(axis=1))
    for first in range(0, BINS, ROWS_IN_BAND):
        band = codes[rows, first : first + ROWS_IN_BAND].astype(np.uint64)
        key = _mix_columns(band)
        order = np.argsort(key, kind="stable")
        key, texts = key[order], rows[order]
        for step in range(1, NEIGHBOURS + 1):
            left, right = texts[:-step], texts[step:]
            take = (key[:-step] == key[step:]) & (labels[left] != labels[right])
            if take.any():
                yield left[take], right[take]


def _mix_columns(band: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    key = np.zeros(len(band), np.uint64)
    for column in band.T:
        key = (key ^ column) * np.uint64(0x100000001B3)  # FNV-1a's prime
        key ^= key >> np.uint64(29)
    return key


class _Jaccard:
    """Exact weighted Jaccard similarity of pairs of texts."""

    def __init__(self, sets: ShingleSets) -> None:
        from scipy.sparse import csr_matrix

        columns = (sets.hashes >> np.uint32(1)).astype(np.int32)  # scipy's column numbers are signed
        self._weights = csr_matrix((sets.weights, columns, sets.starts), shape=(sets.count, 2**31 - 1))
        self._sums = np.add.reduceat(np.append(sets.weights, 0), sets.starts[:-1]) * (np.diff(sets.starts) > 0)

    def __call__(self, left: Labels, right: Labels) -> npt.NDArray[np.float64]:
        found = np.empty(len(left))
        for first in range(0, len(left), 4 * BATCH):
            some = slice(first, first + 4 * BATCH)
            a, b = left[some], right[some]
            shared = self._weights[a].minimum(self._weights[b]).sum(axis=1)
            total = self._sums[a] + self._sums[b] - np.asarray(shared).ravel()
            found[some] = np.asarray(shared).ravel() / np.maximum(total, 1e-9)
        return found
