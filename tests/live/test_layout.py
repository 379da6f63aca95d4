"""Where checkpoint tensors lie in an engine's parameters: derived exactly, or refused with the tensor's name."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from insitu.live.weights.arena import PAGE, Arena, Slot, plan
from insitu.live.weights.layout import Copy, LayoutError, derive

BF16, FP32 = torch.bfloat16, torch.float32
Q, K, V, DOWN, EMBED, HEAD, NORM = "q", "k", "v", "down", "embed", "lm_head", "norm"
# An engine like vLLM: q, k and v merged, a vocabulary of 10 padded to 12 rows, and a vector kept in fp32.
SLOTS = plan(
    [("qkv_proj", BF16, (8, 4)), ("down_proj", BF16, (4, 6)), ("embedding", BF16, (12, 4)), ("norm", FP32, (4,))]
)
SOURCES = {Q: (4, 4), K: (2, 4), V: (2, 4), DOWN: (4, 6), EMBED: (10, 4), NORM: (4,)}
COPIES = [
    Copy(Q, 0, "qkv_proj", 0, 16, True),
    Copy(K, 0, "qkv_proj", 16, 8, True),
    Copy(V, 0, "qkv_proj", 24, 8, True),
    Copy(DOWN, 0, "down_proj", 0, 24, True),
    Copy(EMBED, 0, "embedding", 0, 40, True),
    Copy(NORM, 0, "norm", 0, 4, True),
]
at = {slot.name: slot.offset for slot in SLOTS}
EXPECTED = [
    Slot(Q, at["qkv_proj"], "bfloat16", (4, 4)),
    Slot(K, at["qkv_proj"] + 32, "bfloat16", (2, 4)),
    Slot(V, at["qkv_proj"] + 48, "bfloat16", (2, 4)),
    Slot(DOWN, at["down_proj"], "bfloat16", (4, 6)),
    Slot(EMBED, at["embedding"], "bfloat16", (10, 4)),
    Slot(NORM, at["norm"], "float32", (4,)),
]


def found(copies: Sequence[Copy] = COPIES, **changes: object) -> list[Slot]:
    options: dict[str, object] = {"sources": SOURCES, "slots": SLOTS, "padded": {"embedding"}, **changes}
    return derive(copies, **options)  # type: ignore[arg-type]


def without(source: str) -> list[Copy]:
    return [copy for copy in COPIES if copy.source != source]


def instead(source: str, *copies: Copy) -> list[Copy]:
    return [*without(source), *copies]


# -- what is found -----------------------------------------------------------------------------------------------------
def test_merged_padded_and_fp32_parameters_are_divided_under_the_checkpoints_names() -> None:
    assert found() == EXPECTED


def test_the_order_of_the_copies_and_of_the_checkpoint_does_not_matter() -> None:
    backwards = dict(reversed(SOURCES.items()))
    assert found(COPIES[::-1], sources=backwards) == EXPECTED
    assert found(COPIES[3:] + COPIES[:3]) == EXPECTED


def test_the_slots_found_are_what_an_arena_gives_out() -> None:
    arena = Arena.create(SLOTS)
    for i, view in enumerate(arena.views().values()):
        view.copy_(torch.arange(view.numel()).view(view.shape) + 100 * i)
    views = arena.renamed(found()).views()
    merged = arena.views()["qkv_proj"]
    assert torch.equal(torch.cat([views[Q], views[K], views[V]]), merged)
    assert torch.equal(views[EMBED], arena.views()["embedding"][:10])
    assert views[NORM].tolist() == [300, 301, 302, 303]
    arena.close()


def test_a_tensor_loaded_in_slices_is_put_together_again_in_any_order() -> None:
    tiles = [Copy(DOWN, start, "down_proj", start, 6, True) for start in (12, 0, 18, 6)]
    assert found(instead(DOWN, *tiles)) == EXPECTED


def test_the_same_copy_seen_twice_is_one() -> None:
    assert found(COPIES + COPIES) == EXPECTED


def test_pieces_that_do_not_begin_where_the_parameter_begins_are_put_together_too() -> None:
    halves = [Copy(V, 4, "qkv_proj", 28, 4, True), Copy(V, 0, "qkv_proj", 24, 4, True)]
    assert found(instead(V, *halves)) == EXPECTED


def test_a_tied_tensor_that_the_engine_leaves_out_has_no_slot() -> None:
    assert found(sources={**SOURCES, HEAD: (10, 4)}, aliases={HEAD}) == EXPECTED
    with pytest.raises(LayoutError, match=r"did not take the checkpoint's 'lm_head'"):
        found(sources={**SOURCES, HEAD: (10, 4)})


def test_a_padded_vocabulary_may_also_be_full() -> None:
    slots = [replace(slot, shape=(10, 4)) if slot.name == "embedding" else slot for slot in SLOTS]
    assert found(slots=slots) == EXPECTED


# -- what is refused ---------------------------------------------------------------------------------------------------
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "computed": (
        lambda: found([*COPIES, Copy(None, 0, "norm", 0, 4, True)]),
        r"computes 'norm' instead of copying",
    ),
    "computed in part": (
        lambda: found(instead(K, Copy(None, 0, "qkv_proj", 16, 8, True))),
        r"computes 'qkv_proj' instead of copying",
    ),
    "not taken": (lambda: found(without(K)), r"did not take the checkpoint's 'k'"),
    "an alias in vain": (lambda: found(without(K), aliases={V}), r"did not take the checkpoint's 'k'"),
    "twice in one parameter": (
        lambda: found([*without(V), Copy(K, 0, "qkv_proj", 24, 8, True)]),
        r"'k' is stored twice, in 'qkv_proj' and 'qkv_proj'",
    ),
    "twice in two parameters": (
        lambda: found([*COPIES, Copy(NORM, 0, "down_proj", 0, 4, True)]),
        r"'norm' is stored twice, in 'down_proj' and 'norm'",
    ),
    "a part of it twice": (
        lambda: found([*COPIES, Copy(DOWN, 6, "embedding", 40, 6, True)]),
        r"'down' is stored twice, in 'down_proj' and 'embedding'",
    ),
    "pieces that overlap": (
        lambda: found(
            instead(DOWN, Copy(DOWN, 0, "down_proj", 0, 13, True), Copy(DOWN, 12, "down_proj", 12, 12, True))
        ),
        r"'down' is stored twice",
    ),
    "transposed": (
        lambda: found(instead(DOWN, replace(COPIES[3], contiguous=False))),
        r"'down'.*'down_proj'.*transposed",
    ),
    "a piece of it strided": (
        lambda: found(
            instead(DOWN, Copy(DOWN, 0, "down_proj", 0, 12, True), Copy(DOWN, 12, "down_proj", 12, 12, False))
        ),
        r"'down'.*'down_proj'.*strided",
    ),
    "scattered": (
        lambda: found(instead(DOWN, Copy(DOWN, 0, "down_proj", 0, 6, True), Copy(DOWN, 6, "down_proj", 12, 12, True))),
        r"'down' is scattered over 'down_proj': its element 6",
    ),
    "its halves exchanged": (
        lambda: found(
            instead(DOWN, Copy(DOWN, 0, "down_proj", 12, 12, True), Copy(DOWN, 12, "down_proj", 0, 12, True))
        ),
        r"'down' is scattered over 'down_proj': its element 12",
    ),
    "over two parameters": (
        lambda: found(instead(K, Copy(K, 0, "qkv_proj", 16, 4, True), Copy(K, 4, "down_proj", 4, 4, True))),
        r"'k' is scattered over 'qkv_proj': its element 4",
    ),
    "its beginning left out": (
        lambda: found(instead(DOWN, Copy(DOWN, 6, "down_proj", 6, 18, True))),
        r"'down' is scattered over 'down_proj': its element 0",
    ),
    "its middle left out": (
        lambda: found(instead(DOWN, Copy(DOWN, 0, "down_proj", 0, 6, True), Copy(DOWN, 12, "down_proj", 12, 12, True))),
        r"'down' is scattered over 'down_proj': its element 6",
    ),
    "its end left out": (
        lambda: found(instead(DOWN, Copy(DOWN, 0, "down_proj", 0, 23, True))),
        r"'down' has 24 elements and 23 of them were loaded into 'down_proj'",
    ),
    "more of it than there is": (
        lambda: found(sources={**SOURCES, V: (1, 4)}),
        r"'v' has 4 elements and 8 of them",
    ),
    "over the tensor before": (
        lambda: found(instead(K, Copy(K, 0, "qkv_proj", 15, 8, True))),
        r"'k' overlaps the tensor before it in 'qkv_proj'",
    ),
    "two in one place": (
        lambda: found(instead(V, Copy(V, 0, "qkv_proj", 16, 8, True))),
        r"'v' overlaps the tensor before it in 'qkv_proj'",
    ),
    "bytes between tensors": (
        lambda: found(
            [copy for copy in COPIES if copy.source != K], sources={n: s for n, s in SOURCES.items() if n != K}
        ),
        r"16 bytes of 'qkv_proj' before 'v' come from no",
    ),
    "bytes before the first tensor": (
        lambda: found(instead(EMBED, Copy(EMBED, 0, "embedding", 8, 40, True))),
        r"16 bytes of 'embedding' before 'embed' come from no",
    ),
    "bytes behind the last tensor": (
        lambda: found(without(V), sources={n: s for n, s in SOURCES.items() if n != V}),
        r"16 bytes at the end of 'qkv_proj' come from no",
    ),
    "padding where none is allowed": (lambda: found(padded=()), r"16 bytes at the end of 'embedding' come from no"),
    "padding of another parameter": (
        lambda: found(padded={"qkv_proj"}),
        r"16 bytes at the end of 'embedding' come from no",
    ),
    "nothing but padding": (
        lambda: found(without(EMBED), sources={n: s for n, s in SOURCES.items() if n != EMBED}),
        r"96 bytes at the end of 'embedding' come from no",
    ),
    "a parameter that nothing fills": (
        lambda: found(slots=[*SLOTS, Slot("bias", SLOTS[-1].offset + PAGE, "bfloat16", (3,))]),
        r"6 bytes at the end of 'bias' come from no",
    ),
    "beyond the end": (
        lambda: found(instead(NORM, Copy(NORM, 0, "norm", 0, 5, True)), sources={**SOURCES, NORM: (5,)}),
        r"'norm' reaches beyond the end of 'norm'",
    ),
    "beyond the end of a padded one": (
        lambda: found(instead(EMBED, Copy(EMBED, 0, "embedding", 0, 49, True)), sources={**SOURCES, EMBED: (7, 7)}),
        r"'embed' reaches beyond the end of 'embedding'",
    ),
}


@pytest.mark.parametrize(("derived", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_no_plain_whole_copy_is_refused_by_name(derived: Callable[[], object], said: str) -> None:
    assert found() == EXPECTED  # good until then
    with pytest.raises(LayoutError, match=said):
        derived()


def test_no_copies_at_all_are_refused_by_the_first_tensors_name() -> None:
    with pytest.raises(LayoutError, match="did not take the checkpoint's 'q'"):
        found([])
