"""This module shuffles with random access: its permutations of range(size) need no memory and no state.

A training stream must be a pure function of (seed, position), also when the set has 10^12 problems. A keyed
Feistel network is a bijection of 2^(2k) numbers; walking its cycles until a value falls below `size` makes it
one of range(size) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 2).
"""

import hashlib
from dataclasses import dataclass

ROUNDS = 6


def derive_key(*parts: object) -> bytes:
    """Return a 16-byte key of the given parts; it is the same on every machine and in every Python process."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Permutation:
    """This is a fixed pseudo-random permutation of range(size) that `key` chooses."""

    size: int
    key: bytes

    def __post_init__(self) -> None:
        assert self.size >= 1, self.size

    @property
    def half_bits(self) -> int:
        """Return the bits of one Feistel half: the network permutes range(2 ** (2 * half_bits)), the next size >= 2."""
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    def __call__(self, position: int) -> int:
        """Element at `position`; IndexError outside range(size)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size} elements")
        value = self._encrypt(position)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        bits = self.half_bits
        mask = (1 << bits) - 1
        left, right = value >> bits, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (self._round(number, right) & mask)
        return left << bits | right

    def _round(self, number: int, half: int) -> int:
        message = bytes([number]) + half.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=self.key).digest(), "little")
