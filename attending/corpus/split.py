"""The one split rule, and the numbers drawn from texts that decide order and repeats."""

from hashlib import sha256


def is_held_out(key: str) -> bool:
    """Whether a document is kept for evaluation: sha256(key) mod 50 = 0, one in fifty.

    Applied after duplicates are removed. The key is the document's id, or what all documents on
    one subject share (MedQuAD: `focus`), so that no subject is on both sides.
    """
    return int.from_bytes(sha256(key.encode()).digest()) % 50 == 0


def draw(*parts: object) -> int:
    """A number in [0, 2**64) that depends on the parts alone: the same on every machine."""
    return int.from_bytes(sha256("/".join(map(str, parts)).encode()).digest()[:8])


def repeats(found: int, max_repeats: int, weight: float, key: str) -> int:
    """Times that a training document is seen: min(found, max_repeats) times its weight.

    Of a fraction, so large a part of the documents, drawn by `key`, is seen once more.
    """
    times = min(found, max_repeats) * weight
    return int(times) + (draw("repeats", key) < (times - int(times)) * 2**64)
