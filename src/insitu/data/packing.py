"""Documents as one stream of tokens, cut into sequences of T.

Every document is followed by the end-of-text token and the next document; nothing is padded and nothing is left out. A sequence
begins wherever the one before it ended, so most begin inside a document.
"""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from insitu.data.batch import IGNORE
from insitu.data.tokens import Tokens


class PackedStream:
    """The endless training stream of one source: epoch after epoch, the documents of each in an order of its own.

    Args:
        tokens: of the training side.
        sequence_length: T.
        seed: of the orders; one for each source.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, seed: int) -> None:
        self.tokens, self.sequence_length, self.seed = tokens, sequence_length, seed
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def capacity(self, epochs: float) -> int:
        """How many sequences there are before a token is seen more than ``epochs`` times."""
        return math.floor(epochs * len(self.tokens.ids) / self.sequence_length)

    def sequence(self, position: int) -> Tensor:
        """Sequence number ``position`` of the stream, int64 [T]; a pure function of tokens, T, seed and position."""
        size, start = len(self.tokens.ids), position * self.sequence_length
        sequence = np.empty(self.sequence_length, np.int64)
        filled = 0
        while filled < self.sequence_length:
            epoch, offset = divmod(start + filled, size)
            order, ends = self._order(epoch)
            index = int(np.searchsorted(ends, offset, side="right"))
            left = int(ends[index]) - offset  # tokens of this document from here on
            begin = int(self.tokens.ends[order[index]]) - left
            length = min(left, self.sequence_length - filled)
            sequence[filled : filled + length] = self.tokens.ids[begin : begin + length]
            filled += length
        return torch.from_numpy(sequence)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch in their order, and where in the epoch each ends."""
        if epoch not in self._orders:
            # Sorting raw 64-bit numbers and not Generator.permutation, whose results numpy does not promise to keep.
            keys = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self.tokens.ends))
            order = np.argsort(keys, kind="stable").astype(np.int64)
            lengths = np.diff(self.tokens.ends, prepend=np.int64(0))
            # A sequence at a border needs the epochs on both sides of it, and older ones never come back.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = (order, np.cumsum(lengths[order]))
        return self._orders[epoch]


class ValidationSet(Dataset[dict[str, Tensor]]):
    """The validation documents of a source in their own order, in sequences of T; the last is padded, and padding is no target.

    Items are ``{"input_ids": int64 [T], "labels": int64 [T]}``.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, pad_token_id: int) -> None:
        self.tokens, self.sequence_length, self.pad_token_id = tokens, sequence_length, pad_token_id

    def __len__(self) -> int:
        # A lone last token has nothing before it to be predicted from.
        return math.ceil((len(self.tokens.ids) - 1) / self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self.tokens.ids[index * self.sequence_length : (index + 1) * self.sequence_length].astype(np.int64)
        input_ids = torch.full((self.sequence_length,), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((self.sequence_length,), IGNORE, dtype=torch.int64)
        input_ids[: len(part)] = labels[: len(part)] = torch.from_numpy(part)
        return {"input_ids": input_ids, "labels": labels}


def mixed_seed(seed: int, name: str) -> int:
    """A seed for one source, the same whatever other sources there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big")
