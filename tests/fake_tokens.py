"""Tokens of the right form that open nothing: what a test plants, and then looks for where no secret may be.

They are made and not written out, so that the scan for secrets has nothing to find here.
"""

from __future__ import annotations

import hashlib


def hugging_face(place: str) -> str:
    """hf_ and 34 letters and digits; another one for each `place` that a token can come from."""
    return f"hf_{hashlib.sha256(place.encode()).hexdigest()[:34]}"


def wandb(place: str) -> str:
    """40 hexadecimal digits."""
    return hashlib.sha1(f"wandb {place}".encode()).hexdigest()


def kaggle_key(place: str) -> str:
    """32 hexadecimal digits: the key in kaggle.json."""
    return hashlib.sha256(f"kaggle {place}".encode()).hexdigest()[:32]


def kaggle_token(place: str) -> str:
    """KGAT_ and 32 hexadecimal digits."""
    return f"KGAT_{kaggle_key(place + ' token')}"
