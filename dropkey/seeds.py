"""Seeds by counter: every random number comes from a seed that is derived from the run's seed and its purpose, so no
generator state needs to be saved and a resumed run draws the same numbers."""

import hashlib
import operator
import struct


def derive_seed(*parts: int | str) -> int:
    """An integer in [0, 2**63), the same on every platform; different parts give unrelated seeds.

    Each part is hashed with its type and length, so ("1", 2), (1, 2) and (12,) all differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tag, text = (b"s", part) if isinstance(part, str) else (b"i", str(operator.index(part)))
        encoded = text.encode()
        digest.update(struct.pack("<cI", tag, len(encoded)) + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1
