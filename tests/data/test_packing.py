"""Streams of packed documents against a naive stream that is built token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import numbered, tokens

from insitu.data.batch import IGNORE
from insitu.data.packing import PackedStream, ValidationSet, mixed_seed


def _naive(stream: PackedStream, epochs: int) -> list[int]:
    """The documents of each epoch one behind the other, in the order that the stream's first tokens show."""
    found: list[int] = []
    starts = [0, *stream.tokens.ends[:-1]]
    for epoch in range(epochs):
        order, _ = stream._order(epoch)
        assert sorted(order) == list(range(len(starts))), "each document once an epoch"
        for document in order:
            found.extend(int(token) for token in stream.tokens.ids[starts[document] : stream.tokens.ends[document]])
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=9), min_size=1, max_size=7),
    st.integers(2, 20),
    st.integers(0, 2**63),
)
def test_sequences_are_slices_of_the_stream(documents: list[list[int]], length: int, seed: int) -> None:
    stream = PackedStream(tokens([[*document, 0] for document in documents]), length, seed)
    naive = _naive(stream, 4)
    for position in range(len(naive) // length):
        expected = naive[position * length : (position + 1) * length]
        assert stream.sequence(position).tolist() == expected
    assert stream.sequence(0).dtype == torch.int64


def test_a_sequence_does_not_depend_on_what_was_read_before() -> None:
    source = numbered(1, 20, 7)
    forward, backward = PackedStream(source, 9, 5), PackedStream(source, 9, 5)
    ahead = [forward.sequence(p).tolist() for p in range(60)]
    assert [backward.sequence(p).tolist() for p in reversed(range(60))] == ahead[::-1]


def test_orders_differ_between_epochs_seeds_and_sources() -> None:
    source = numbered(1, 200, 3)
    orders = [tuple(PackedStream(source, 8, seed)._order(epoch)[0]) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert mixed_seed(1, "a") != mixed_seed(1, "b")
    assert mixed_seed(1, "a") != mixed_seed(2, "a")


def test_the_order_is_the_same_for_ever() -> None:
    # Written down: a resumed run must go on in the order it began with, also with another version of numpy.
    assert PackedStream(numbered(1, 8, 3), 4, 11)._order(2)[0].tolist() == [1, 6, 4, 7, 3, 2, 5, 0]


def test_capacity_counts_whole_sequences() -> None:
    stream = PackedStream(numbered(1, 10, 7), 16, 0)  # 70 tokens
    assert [stream.capacity(epochs) for epochs in (0.2, 1, 2, 2.5)] == [0, 4, 8, 10]
    seen = np.concatenate([stream.sequence(p).numpy() for p in range(stream.capacity(2))])
    assert np.unique(seen[seen > 0], return_counts=True)[1].max() <= 2


@pytest.mark.parametrize("length", [4, 5, 30, 64])
def test_validation_covers_every_token_once_and_pads_the_last(length: int) -> None:
    source = numbered(1, 3, 10)
    dataset = ValidationSet(source, length, pad_token_id=9)
    items = [dataset[i] for i in range(len(dataset))]
    assert all(item["input_ids"].shape == item["labels"].shape == (length,) for item in items)
    labels = torch.cat([item["labels"] for item in items])
    inputs = torch.cat([item["input_ids"] for item in items])
    real = labels != IGNORE
    lost = 30 - int(real.sum())
    assert lost == (1 if 30 % length == 1 else 0)
    assert labels[real].tolist() == source.ids[: 30 - lost].tolist()
    assert (inputs[real] == labels[real]).all()
    assert (inputs[~real] == 9).all()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_last_token_that_nothing_precedes_is_no_sequence() -> None:
    assert len(ValidationSet(numbered(1, 1, 9), 4, 0)) == 2
    assert len(ValidationSet(numbered(1, 1, 10), 4, 0)) == 3
