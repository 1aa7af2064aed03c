"""Where the results of millions of keys are, in 24 bytes each; Python's dictionaries take 200."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice

import numpy as np
import numpy.typing as npt

_HASH_BYTES = 16  # that two of a billion keys have one hash has a probability of 1e-21
Hashes = npt.NDArray[np.bytes_]
Values = npt.NDArray[np.int64]

ABSENT = -1
_FOUND_TOGETHER = 1 << 16  # keys


class Index:
    """Keys -> whole numbers from 0 on. Keys themselves are not kept, only their hashes."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, f"S{_HASH_BYTES}")  # sorted
        self._values = np.empty(0, np.int64)
        self._recent: dict[bytes, int] = {}  # set since these were sorted; ABSENT where removed

    def get(self, key: str) -> int:
        """The number of a key, or ABSENT."""
        digest = _hash(key)
        if digest in self._recent:
            return self._recent[digest]
        at = int(np.searchsorted(self._hashes, np.bytes_(digest)))
        found = at < len(self._hashes) and self._hashes[at] == digest.rstrip(b"\0")  # as numpy has them
        return int(self._values[at]) if found else ABSENT

    def find(self, keys: Iterable[str]) -> Values:
        """The numbers of many keys, ABSENT where there is none."""
        self._sort_in()
        remaining, found = iter(keys), [np.empty(0, np.int64)]
        while len(wanted := hashes_of(islice(remaining, _FOUND_TOGETHER))):
            found.append(self._find_some(wanted))
        return np.concatenate(found)

    def _find_some(self, wanted: Hashes) -> Values:
        if len(self._hashes) == 0:
            return np.full(len(wanted), ABSENT, np.int64)
        at = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[at] == wanted, self._values[at], ABSENT)

    def set(self, key: str, value: int) -> None:
        """Set the number of a key; ABSENT removes it."""
        self._recent[_hash(key)] = value

    def _sort_in(self) -> None:
        recent, self._recent = self._recent, {}
        if recent:
            self.set_many(np.array([*recent], self._hashes.dtype), np.array([*recent.values()], np.int64))

    def set_many(self, hashes: Hashes, values: Values) -> None:
        """Set the numbers of the keys of these ``hashes_of``; of equal ones the last counts."""
        self._sort_in()
        if len(self._hashes):  # of a million keys each copy is 24 MB
            hashes, values = np.concatenate([self._hashes, hashes]), np.concatenate([self._values, values])
        order = np.argsort(hashes, kind="stable")
        hashes, values = hashes[order], values[order]
        del order
        last = np.ones(len(hashes), bool)
        last[:-1] = hashes[1:] != hashes[:-1]
        last &= values != ABSENT
        self._hashes, self._values = (hashes, values) if last.all() else (hashes[last], values[last])


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=_HASH_BYTES).digest()


def hashes_of(keys: Iterable[str]) -> Hashes:
    """What an index knows keys by."""
    joined = bytearray()
    for key in keys:
        joined += _hash(key)
    return np.frombuffer(joined, f"S{_HASH_BYTES}")
