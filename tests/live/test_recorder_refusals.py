"""Loaders that do more than copy: what was recorded of them is refused, or, if it is faithful, the proof refuses it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loading import Load, Loader, Tensors, checkpoint, narrowed, place

from insitu.live.proof import compare
from insitu.live.weights.attach import AttachError
from insitu.live.weights.layout import LayoutError

DOWN, NORM, Q, K, V = "mlp.down_proj.weight", "norm.weight", *(f"attn.{x}_proj.weight" for x in "qkv")
Parameters = dict[str, torch.nn.Parameter]


def differing(name: str, instead: Callable[[torch.Tensor, torch.Tensor], object]) -> Loader:
    """A loader that is plain for all tensors but one, of which it gets the place and the tensor."""

    def loader(parameters: Parameters, tensors: Tensors) -> None:
        for each, loaded in tensors:
            target = place(parameters, each, loaded.shape[0])
            if each == name:
                instead(target, loaded)
            else:
                target.copy_(loaded)

    return loader


REFUSALS: dict[str, tuple[Loader, str]] = {
    "doubled": (differing(NORM, lambda t, s: t.copy_(s * 2)), rf"computes '{NORM}'"),
    "with one added, as some norms are": (differing(NORM, lambda t, s: t.copy_(s.float() + 1)), rf"computes '{NORM}'"),
    "converted apart": (differing(NORM, lambda t, s: t.copy_(s.float())), rf"computes '{NORM}'"),
    "cloned": (differing(DOWN, lambda t, s: t.copy_(s.clone())), rf"computes '{DOWN}'"),
    "permuted into a copy": (differing(Q, lambda t, s: t.copy_(s.flip(0))), r"computes 'attn\.qkv_proj\.weight'"),
    "turned into a copy": (
        differing(Q, lambda t, s: t.copy_(s.t().contiguous())),
        r"computes 'attn\.qkv_proj\.weight'",
    ),
    "turned": (differing(Q, lambda t, s: t.copy_(s.t())), rf"'{Q}'.*'attn\.qkv_proj\.weight'.*transposed or strided"),
    "into a turned place": (differing(Q, lambda t, s: t.t().copy_(s)), rf"'{Q}'.*transposed or strided"),
    "every other row": (
        differing(Q, lambda t, s: (t[0::2].copy_(s[:4]), t[1::2].copy_(s[4:]))),
        rf"'{Q}'.*transposed or strided",
    ),
    "column by column": (
        differing(DOWN, lambda t, s: [t[:, i].copy_(s[:, i]) for i in range(12)]),
        rf"'{DOWN}'.*transposed or strided",
    ),
    "the left half only": (differing(DOWN, lambda t, s: t[:, :6].copy_(s[:, :6])), rf"'{DOWN}'.*transposed or strided"),
    "one row for all": (differing(DOWN, lambda t, s: t.copy_(s[0])), rf"'{DOWN}'.*transposed or strided"),
    "one element for all": (differing(NORM, lambda t, s: t.copy_(s[0])), rf"'{NORM}'.*transposed or strided"),
    "rows in reverse": (
        differing(DOWN, lambda t, s: [t[i].copy_(s[7 - i]) for i in range(8)]),
        rf"'{DOWN}' is scattered over '{DOWN}': its element 12",
    ),
    "heads interleaved": (
        differing(Q, lambda t, s: [t[i].copy_(s[(i % 4) * 2 + i // 4]) for i in range(8)]),
        rf"'{Q}' is scattered over 'attn\.qkv_proj\.weight': its element 8",
    ),
    "the first rows only": (differing(DOWN, lambda t, s: t[:5].copy_(s[:5])), rf"'{DOWN}' has 96 elements and 60"),
    "not at all": (differing(DOWN, lambda t, s: None), rf"did not take the checkpoint's '{DOWN}'"),
    "into two places": (
        differing(
            K, lambda t, s: (t.copy_(s), torch.as_strided(t, t.shape, t.stride(), t.storage_offset() + 32).copy_(s))
        ),
        rf"'{K}' is stored twice",
    ),
    "not copied by a copy": (differing(DOWN, lambda t, s: t.set_(s)), rf"did not take the checkpoint's '{DOWN}'"),
    "by an index": (
        differing(DOWN, lambda t, s: t.index_put_((torch.arange(8),), s)),
        rf"did not take the checkpoint's '{DOWN}'",
    ),
    "added to zeros": (differing(DOWN, lambda t, s: t.zero_().add_(s)), rf"did not take the checkpoint's '{DOWN}'"),
}


@pytest.mark.parametrize(("loader", "said"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_loader_that_does_more_or_less_than_copy_is_refused_by_name(loader: Loader, said: str) -> None:
    with pytest.raises(LayoutError, match=said.replace("_proj.", r"_proj\.")):
        Load(loader, checkpoint().items()).slots()


def test_a_tensor_changed_after_it_was_copied_is_refused_by_the_comparison() -> None:
    def folding(parameters: Parameters, tensors: Tensors) -> None:
        narrowed(parameters, tensors)
        parameters[NORM].data.add_(1)  # no copy, so no record of it

    done = Load(folding, checkpoint().items())
    with pytest.raises(AttachError, match=rf"'{NORM}' in the arena is not what the version holds"):
        compare(done.found(), checkpoint().items(), {})


# -- k and v exchanged: three different mistakes -----------------------------------------------------------------------
def test_an_engine_that_puts_k_in_vs_place_is_followed_there() -> None:
    """The layout tells where a tensor lies, not where an engine ought to have put it. The bytes under each name are the
    checkpoint's, so the comparison has nothing to object: such an engine is trained faithfully, and answers nonsense."""

    def exchanging(parameters: Parameters, tensors: Tensors) -> None:
        for name, loaded in tensors:
            aimed = {K: V, V: K}.get(name, name)
            place(parameters, aimed, loaded.shape[0]).copy_(loaded)

    done = Load(exchanging, checkpoint().items())
    slots = {slot.name: slot.offset for slot in done.slots()}
    assert slots[V] + 64 == slots[K]
    assert compare(done.found(), checkpoint().items(), {}) > 0


def test_a_reader_that_gives_k_under_vs_name_is_refused_by_the_comparison() -> None:
    tensors = checkpoint()
    exchanged = {**tensors, K: tensors[V], V: tensors[K]}
    done = Load(narrowed, exchanged.items())
    assert len(done.slots()) == len(tensors)  # nothing is wrong with the layout
    with pytest.raises(AttachError, match=rf"'{K}' in the arena is not what the version holds"):
        compare(done.found(), tensors.items(), {})


def test_a_layout_in_which_k_and_v_are_exchanged_is_refused_by_the_comparison() -> None:
    done = Load(narrowed, checkpoint().items())
    names = {K: V, V: K}
    wrong = [replace(slot, name=names.get(slot.name, slot.name)) for slot in done.slots()]
    with pytest.raises(AttachError, match=rf"'{K}' in the arena is not what the version holds"):
        compare(done.arena.renamed(wrong).views(), checkpoint().items(), {})
