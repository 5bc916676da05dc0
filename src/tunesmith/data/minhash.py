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
import string
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from tunesmith.data.mapped import mapped_array, nameless_file, needs_room, scratch

SIMILAR = 0.7
BINS = 128
ROWS_IN_BAND = 4  # 32 bands of 4: a pair of similarity 0.7 is a candidate with probability 0.9998, of 0.3 with 0.23
NEIGHBOURS = 6  # candidates taken a text and band, so that the cost stays linear where many texts are alike
BATCH = 2_000
MOST_WORDS = 500_000  # remembered at once
PLACES = 2**22  # counters for how many texts have an element
AT_ONCE = 2**18  # elements, places or pairs
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff"  # written without spaces: a character is a word
WORDS = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s.,;:!?'\"]")
# The same for ASCII text, in half the time: marks vanish, other signs stand alone, the rest is split at spaces.
ASCII_SIGNS = {ord(sign): " " if sign in ".,;:!?'\"" else f" {sign} " for sign in string.punctuation if sign != "_"}

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
    """The sets of all texts as one array: text i has the sorted `hashes[starts[i]:starts[i+1]]`."""

    def __init__(self, hashes: npt.NDArray[np.uint32], starts: Labels) -> None:
        self.hashes, self.starts, self.count = hashes, starts, len(starts) - 1

    @cached_property
    def weights(self) -> npt.NDArray[np.float32]:
        """What each place weighs, by how many texts have it. [PLACES]"""
        frequency = np.zeros(PLACES, np.uint32)
        for first in range(0, len(self.hashes), AT_ONCE):
            np.add.at(frequency, _place(self.hashes[first : first + AT_ONCE]), np.uint32(1))
        common, rare = max(0.5 * self.count, 8.0), max(0.05 * self.count, 4.0)
        weights = np.empty(PLACES, np.float32)
        for first in range(0, PLACES, AT_ONCE):
            some = slice(first, first + AT_ONCE)
            with np.errstate(divide="ignore"):
                weights[some] = np.clip(np.log(common / frequency[some]) / np.log(common / rare), 0.0, 1.0)
        return weights

    def of(self, texts: Labels) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], Labels]:
        """The elements of some texts, their weights, and for each its place in `texts`. All [elements]"""
        hashes, owner = self._elements(texts)
        return hashes, self.weights[_place(hashes)], owner

    def only(self, texts: Labels) -> ShingleSets:
        """The sets of these texts, in this order."""
        if len(texts) == self.count:
            return self
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.starts[texts + 1] - self.starts[texts])])
        hashes = scratch((int(starts[-1]),), np.uint32)
        for first in range(0, len(texts), BATCH):
            some = texts[first : first + BATCH]
            hashes[starts[first] : starts[first + len(some)]] = self._elements(some)[0]
        return ShingleSets(hashes, starts)

    def _elements(self, texts: Labels) -> tuple[npt.NDArray[np.uint32], Labels]:
        sizes = self.starts[texts + 1] - self.starts[texts]
        owner = np.repeat(np.arange(len(texts)), sizes)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.hashes[self.starts[texts][owner] + offset], owner


def cluster(sets: ShingleSets) -> Labels:
    """A cluster number for each text; near-duplicates (and their near-duplicates) share one. [texts]"""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = sets.count
    labels = np.arange(count, dtype=np.int64)
    for left, right in candidate_pairs(signatures(sets), labels):
        near = similarity(sets, left, right) >= SIMILAR
        if near.any():
            edges = (np.ones(near.sum(), np.int8), (labels[left[near]], labels[right[near]]))
            _, merged = connected_components(coo_matrix(edges, shape=(count, count)), directed=False)
            labels[:] = merged[labels]
    return labels


def shingle_sets(texts: Iterable[str]) -> ShingleSets:
    """Words and word pairs of every text, hashed to 32 bits."""
    lookup = _WordHashes()
    stream = iter(texts)
    sizes: list[Labels] = [np.zeros(1, np.int64)]
    with nameless_file() as file:
        while batch := list(islice(stream, BATCH)):
            keys = _shingles([split_words(text) for text in batch], lookup)
            with needs_room():
                file.write(keys.astype(np.uint32).tobytes())
            sizes.append(np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(batch)))
        return ShingleSets(mapped_array(file, np.uint32), np.cumsum(np.concatenate(sizes)))


def _shingles(rows: list[list[str]], lookup: _WordHashes) -> npt.NDArray[np.uint64]:
    """Each distinct element of each row once, as row number << 32 | hash, sorted."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    words = np.fromiter(map(lookup.__getitem__, chain.from_iterable(rows)), np.uint64, int(lengths.sum()))
    row = np.repeat(np.arange(len(rows), dtype=np.uint64), lengths) << np.uint64(32)
    pairs = words[:-1] * np.uint64(0xD6E8FEB86659FD93) + words[1:]
    inside = row[:-1] == row[1:]
    keys = np.concatenate([row | _high_bits(words), (row[:-1] | _high_bits(pairs))[inside]])
    keys.sort()
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]]  # np.unique takes 50 times as long


def _high_bits(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def _place(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Where an element is counted. Two may share a place: in a data set so large this changes next to nothing."""
    return hashes >> np.uint32(10)


def split_words(text: str) -> list[str]:
    """Words, and signs that aren't punctuation: `split_words("it's 3+4.") == ["it", "s", "3", "+", "4"]`."""
    return text.translate(ASCII_SIGNS).split() if text.isascii() else WORDS.findall(text)


def signatures(sets: ShingleSets) -> npt.NDArray[np.uint32]:
    """MinHash signatures; all zero for a text without any element that counts. [texts, BINS]"""
    codes = scratch((sets.count, BINS), np.uint32)
    for first in range(0, sets.count, BATCH):
        last = min(first + BATCH, sets.count)
        smallest = np.full((last - first, BINS), np.inf, np.float32)
        hashes, weights, owner = sets.of(np.arange(first, last))
        counts = weights > 0
        mixed = _mix(hashes[counts])
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        value = (-np.log(uniform) / weights[counts]).astype(np.float32)
        place = owner[counts] * BINS + (mixed & np.uint64(BINS - 1)).astype(np.int64)
        np.minimum.at(smallest.reshape(-1), place, value)
        codes[first:last] = _fill_empty_bins(smallest)
    return codes


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
    rows = np.flatnonzero(codes.any(axis=1)).astype(np.int32)
    for first in range(0, BINS, ROWS_IN_BAND):
        key = _band_keys(codes, rows, range(first, first + ROWS_IN_BAND))
        order = np.argsort(key, kind="stable")
        key, texts = key[order], rows[order]
        del order
        for step in range(1, NEIGHBOURS + 1):
            for start in range(0, len(key) - step, AT_ONCE):
                stop = min(start + AT_ONCE, len(key) - step)
                take = start + np.flatnonzero(key[start:stop] == key[start + step : stop + step])
                left, right = texts[take], texts[take + step]
                apart = labels[left] != labels[right]
                if apart.any():
                    yield left[apart].astype(np.int64), right[apart].astype(np.int64)


def _band_keys(
    codes: npt.NDArray[np.uint32], rows: npt.NDArray[np.int32], columns: Iterable[int]
) -> npt.NDArray[np.uint64]:
    key = np.zeros(len(rows), np.uint64)
    for column in columns:
        key = (key ^ codes[rows, column]) * np.uint64(0x100000001B3)  # FNV-1a's prime
        key ^= key >> np.uint64(29)
    return key


def similarity(sets: ShingleSets, left: Labels, right: Labels) -> npt.NDArray[np.float64]:
    """Exact weighted Jaccard similarity of pairs of texts. [pairs]"""
    found = np.empty(len(left))
    for first in range(0, len(left), BATCH):
        some = slice(first, min(first + BATCH, len(left)))
        count = some.stop - first
        hashes, weights, owner = sets.of(np.concatenate([left[some], right[some]]))
        pair = (owner % count).astype(np.uint64)
        order = np.argsort(pair << np.uint64(32) | hashes, kind="stable")
        pair, hashes, weights = pair[order].astype(np.int64), hashes[order], weights[order]
        twice = np.flatnonzero((pair[1:] == pair[:-1]) & (hashes[1:] == hashes[:-1]))  # in both texts of a pair
        shared = np.bincount(pair[twice], weights[twice], minlength=count)
        total = np.bincount(pair, weights, minlength=count) - shared
        found[some] = shared / np.maximum(total, 1e-9)
    return found
