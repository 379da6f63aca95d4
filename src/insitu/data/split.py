"""Which documents are never trained on: a hash of the document itself decides.

So a document that is in two sources, or in one source twice, is on the same side everywhere; more documents or another order
move none from one side to the other; and runs with different seeds are measured on the same text.
"""

import hashlib


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the validation side: True for ``share`` of all texts. White space does not count, as
    copies of a text often differ in it."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * (1 << 64)
