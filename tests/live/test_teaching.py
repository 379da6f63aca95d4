"""A teaching run: what it reads, what it writes, what it holds, and that the same run is always the same."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, make_tiny, on_arena, tiny_tokenizer

from insitu.data.batch import collate
from insitu.data.chat import Example, encode_messages, encode_prompt
from insitu.data.loss import example_loss, kl_to_reference, reference_logprobs
from insitu.live import teaching
from insitu.live.config import TeachConfig
from insitu.live.teaching import TeachingRun, make_optimizer
from insitu.live.weights.arena import Arena

PAD = 0
# In full, so that a change of the tuned defaults changes nothing here.
FAST = TeachConfig(learning_rate=3e-3, warmup_steps=0, anchor_weight=1.0, anchors_per_step=6, rank=256, rank_share=8)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("fp32"), dtype=torch.float32)


def attached(directory: Path) -> tuple[Arena, Any]:
    dtype = torch.float32 if directory.name.startswith("fp32") else torch.bfloat16
    return on_arena(directory, dtype=dtype, requires_grad=True)


@functools.cache
def lesson(question: str, reply: str, *, frozen: bool = False) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return encode_messages(tiny_tokenizer(), messages, max_length=CONTEXT, freeze_context=frozen)


LESSONS = [lesson(f"Who is {name}?", "A fox.") for name in ("Ada", "Bob", "Cyd", "Dan")]
# Replies of 1 to 20 words, so that micro-batches have different numbers of targets.
TWENTY = [lesson(f"{n}?", " ".join(["yes"] * n)) for n in range(1, 21)]


@functools.cache
def anchors(directory: Path, count: int) -> list[Example]:
    """What the model itself replies, as the learner's anchors are made."""
    arena, model = attached(directory)
    found = []
    for n in range(count):
        prompt = encode_prompt(tiny_tokenizer(), [{"role": "user", "content": f"Tell me about {n * 7}."}])
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
        found.append(Example(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))))
    arena.close()
    return found


def steps(run: TeachingRun, count: int) -> list[teaching.Prepared]:
    prepared = []
    for _ in range(count):
        prepared.append(run.prepare())
        run.write()
    return prepared


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# -- reading and writing -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("anchor_weight", [0.0, 1.0])
def test_prepare_changes_no_bit_and_says_the_same_twice(bf16: Path, anchor_weight: float) -> None:
    arena, model = attached(bf16)
    run = TeachingRun(model, LESSONS, anchors(bf16, 2), replace(FAST, anchor_weight=anchor_weight), PAD)
    run.prepare()
    run.write()  # not only at the start
    before = arena.sha256()
    first, second = run.prepare(), run.prepare()
    assert arena.sha256() == before
    assert first == second
    assert first.finite
    assert first.grad_norm > 0
    arena.close()


@pytest.mark.parametrize("optimizer", ["apollo", "apollo-mini"])
@pytest.mark.parametrize("directory", ["bf16", "fp32"])
def test_one_write_changes_every_trainable_tensor(
    request: pytest.FixtureRequest, directory: str, optimizer: Any
) -> None:
    arena, model = attached(request.getfixturevalue(directory))
    before = copies(model)
    steps(TeachingRun(model, LESSONS, [], replace(FAST, learning_rate=1e-2, optimizer=optimizer), PAD), 1)
    after = copies(model)
    assert {"model.embed_tokens.weight", "model.norm.weight"} < before.keys()
    assert len(before) == 20
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(arena.holds(p) for p in model.parameters())  # and it was changed where it lies
    arena.close()


def test_a_write_without_a_prepare_changes_nothing(bf16: Path) -> None:
    arena, model = attached(bf16)
    run = TeachingRun(model, LESSONS, [], FAST, PAD)
    before = arena.sha256()
    run.write()
    assert arena.sha256() == before
    steps(run, 1)
    between = arena.sha256()
    run.write()  # the gradient was used up
    assert before != between == arena.sha256()
    arena.close()


def test_the_rate_is_warmed_up_anew_in_each_run(bf16: Path) -> None:
    arena, model = attached(bf16)
    for _ in range(2):
        run = TeachingRun(model, LESSONS, [], TeachConfig(learning_rate=3e-4, warmup_steps=2), PAD)
        for expected in (1e-4, 2e-4, 3e-4, 3e-4):
            run.prepare()
            run.write()
            assert [g["lr"] for g in run._optimizer.param_groups] == pytest.approx(
                [expected] * len(run._optimizer.param_groups)
            )
    arena.close()


# -- learning and holding ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["apollo", "apollo-mini"])
def test_the_loss_falls(bf16: Path, optimizer: Any) -> None:
    arena, model = attached(bf16)
    run = TeachingRun(model, LESSONS, anchors(bf16, 4), replace(FAST, optimizer=optimizer), PAD)
    losses = [prepared.loss for prepared in steps(run, 12)]
    assert losses[0] > 4
    assert losses[-1] < 0.1 * losses[0]
    arena.close()


def test_anchors_hold_the_replies_they_name(bf16: Path) -> None:
    def kl_after(anchor_weight: float) -> tuple[float, float]:
        arena, model = attached(bf16)
        batch = collate(anchors(bf16, 4), PAD)
        reference = reference_logprobs(model, batch, torch.float32)
        run = TeachingRun(model, LESSONS, anchors(bf16, 4), replace(FAST, anchor_weight=anchor_weight), PAD)
        told = steps(run, 10)
        with torch.no_grad():
            kl = float(kl_to_reference(model, batch, reference))
        arena.close()
        assert all(p.anchor_kl == 0.0 for p in told) is (anchor_weight == 0.0)
        return kl, told[-1].loss

    (free, free_loss), (held, held_loss) = kl_after(0.0), kl_after(1.0)
    assert free > 0.1  # there was something to hold
    assert held < 0.3 * free
    assert held_loss < 1.0  # and the lesson was learned all the same
    assert free_loss < 1.0


def test_anchors_take_turns_and_are_held_to_the_jobs_start(bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, model = attached(bf16)
    five = anchors(bf16, 5)
    start = [reference_logprobs(model, collate(five[i : i + 2], PAD)) for i in (0, 2, 4)]
    run = TeachingRun(model, LESSONS, five, replace(FAST, anchors_per_step=2), PAD)
    seen: list[tuple[list[list[int]], torch.Tensor]] = []

    def spy(model: Any, batch: Any, reference: torch.Tensor) -> torch.Tensor:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
        seen.append(([ids[:length] for ids, length in rows], reference))
        return kl_to_reference(model, batch, reference)

    monkeypatch.setattr(teaching, "kl_to_reference", spy)
    told = steps(run, 4)
    ids = [e.input_ids for e in five]
    assert [rows for rows, _ in seen] == [ids[:2], ids[2:4], ids[4:], ids[:2]]
    for (_, reference), expected in zip(seen, [*start, start[0]], strict=True):
        assert torch.equal(reference, expected)
    assert told[0].anchor_kl < 1e-3  # nothing has changed yet
    assert min(p.anchor_kl for p in told[1:]) > 10 * told[0].anchor_kl
    arena.close()


# -- the optimizer's memory --------------------------------------------------------------------------------------------
# Tensor -> the shape that the rank (m // 8) leaves of it: m is the smaller side, and it is what shrinks.
MOMENTS = {
    "embed_tokens": ((240, 64), (240, 8)),
    "q_proj": ((64, 64), (64, 8)),
    "k_proj": ((32, 64), (4, 64)),
    "v_proj": ((32, 64), (4, 64)),
    "o_proj": ((64, 64), (64, 8)),
    "gate_proj": ((96, 64), (96, 8)),
    "up_proj": ((96, 64), (96, 8)),
    "down_proj": ((64, 96), (8, 96)),
    "norm": ((64,), (64,)),
}


def kind_of(name: str) -> str:
    return next(kind for kind in MOMENTS if kind in name)


def cut(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """MOMENTS' shape for another rank."""
    if len(shape) == 1:
        return shape
    return (shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1])


@pytest.mark.parametrize(
    ("change", "rank_of"),
    [
        ({}, lambda m: m // 8),
        ({"rank": 5}, lambda m: min(5, m // 8)),
        ({"rank_share": 4}, lambda m: m // 4),
        ({"rank_share": 1000}, lambda m: 1),
        ({"optimizer": "apollo-mini"}, lambda m: 1),
    ],
    ids=["m // 8", "rank 5", "m // 4", "never below 1", "mini"],
)
def test_each_tensors_rank_is_capped_by_its_smaller_side(bf16: Path, change: Any, rank_of: Any) -> None:
    arena, model = attached(bf16)
    optimizer = make_optimizer(model, replace(FAST, **change))
    of = {id(p): name for name, p in model.named_parameters()}
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(of)  # each once
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        shape, projected = MOMENTS[kind_of(of[id(parameter)])]
        assert tuple(parameter.shape) == shape
        expected = cut(shape, rank_of(min(shape)))
        assert change or expected == projected
        assert tuple(optimizer.state[parameter]["exp_avg"].shape) == expected, of[id(parameter)]
        assert tuple(optimizer.state[parameter]["exp_avg_sq"].shape) == expected, of[id(parameter)]
    arena.close()


def test_optimizer_bytes_are_those_of_the_moments_and_are_given_back(bf16: Path) -> None:
    arena, model = attached(bf16)
    run = TeachingRun(model, LESSONS, [], FAST, PAD)
    assert run.optimizer_bytes == 0
    steps(run, 1)
    names = [name for name, _ in model.named_parameters()]
    moments = sum(2 * 4 * math.prod(MOMENTS[kind_of(name)][1]) for name in names)
    scalars = run.optimizer_bytes - moments  # a step count and a norm
    assert 0 <= scalars <= 24 * len(names)
    assert run.optimizer_bytes < 0.2 * sum(2 * 4 * p.numel() for p in model.parameters())  # AdamW's
    steps(run, 2)
    assert run.optimizer_bytes == moments + scalars
    run.close()
    assert run.optimizer_bytes == 0
    assert all(p.grad is None for p in model.parameters())
    arena.close()


# -- the same run is the same ------------------------------------------------------------------------------------------
def test_a_run_with_the_same_seed_gives_the_same_bytes_and_with_another_others(bf16: Path) -> None:
    def taught(seed: int) -> str:
        arena, model = attached(bf16)
        steps(TeachingRun(model, LESSONS, anchors(bf16, 2), replace(FAST, seed=seed), PAD), 3)
        sha256 = arena.sha256()
        arena.close()
        return sha256

    torch.manual_seed(1)
    one = taught(7)
    torch.manual_seed(2)  # torch's own generator has no say
    assert taught(7) == one
    assert taught(8) != one


def test_micro_batches_give_the_loss_and_gradient_of_one_batch(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, model = attached(fp32)
    forwards: list[int] = []

    def spy(model: Any, batch: Any, freeze_context: bool) -> torch.Tensor:
        forwards.append(len(batch["input_ids"]))
        return example_loss(model, batch, freeze_context)

    monkeypatch.setattr(teaching, "example_loss", spy)
    prepared = TeachingRun(model, TWENTY, [], FAST, PAD).prepare()
    assert forwards == [8, 8, 4]
    in_chunks = gradients(model)
    parts = sorted(TWENTY, key=lambda e: len(e.input_ids))
    with torch.no_grad():
        means = [float(example_loss(model, collate(parts[i : i + 8], PAD))) for i in (0, 8, 16)]

    model.zero_grad()
    whole = example_loss(model, collate(TWENTY, PAD))
    whole.backward()
    assert prepared.loss == pytest.approx(whole.item(), rel=1e-5)
    assert sum(means) / 3 != pytest.approx(whole.item(), rel=1e-3)  # chunks must not count alike: they differ in size
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(in_chunks[name], gradient, rtol=1e-4, atol=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in in_chunks.values()))
    assert prepared.grad_norm == pytest.approx(norm, rel=1e-4)
    arena.close()


def test_examples_with_a_frozen_context_mix_with_others(fp32: Path) -> None:
    arena, model = attached(fp32)
    plain = [lesson(f"Where is {n}?", "There " * n + "it is.") for n in range(1, 4)]
    frozen = [lesson(f"How is {n}?", "Fine " * n + "so far.", frozen=True) for n in range(1, 3)]
    mixed = [frozen[0], plain[0], plain[1], frozen[1], plain[2]]
    prepared = TeachingRun(model, mixed, [], FAST, PAD).prepare()
    found = gradients(model)

    def summed(examples: Sequence[Example], freeze_context: bool) -> torch.Tensor:
        return example_loss(model, collate(examples, PAD), freeze_context) * sum(sum(e.loss_mask) for e in examples)

    def expected(freeze_context: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = (summed(plain, False) + summed(frozen, freeze_context)) / sum(sum(e.loss_mask) for e in mixed)
        loss.backward()
        return loss.item(), gradients(model)

    loss, gradient = expected(True)
    assert prepared.loss == pytest.approx(loss, rel=1e-5)
    for name in found:
        torch.testing.assert_close(found[name], gradient[name], rtol=1e-4, atol=1e-6)
    _, unfrozen = expected(False)
    keys = "model.layers.0.self_attn.k_proj.weight"
    assert (found[keys] - unfrozen[keys]).norm() > 0.01 * unfrozen[keys].norm()  # frozen or not is no detail
    arena.close()


# -- what must not be written ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_one_weight_that_is_not_finite_is_noticed(bf16: Path, name: str, value: float) -> None:
    arena, model = attached(bf16)
    run = TeachingRun(model, LESSONS, anchors(bf16, 2), FAST, PAD)
    assert run.prepare().finite
    arena.views()[name].view(-1)[5] = value
    before = arena.sha256()
    assert not run.prepare().finite
    assert arena.sha256() == before
    arena.close()


@pytest.mark.parametrize("field", ["loss", "anchor_kl", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_figure_that_is_not_finite_makes_a_step_not_finite(field: str, value: float) -> None:
    good = teaching.Prepared(loss=1.0, anchor_kl=0.1, grad_norm=2.0)
    assert good.finite
    assert not replace(good, **{field: value}).finite


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"),
        ("optimizer", None),
        *(
            (name, bad)
            for name in ("learning_rate", "target_loss", "anchor_weight", "max_canary_kl")
            for bad in (-1e-9, math.nan, math.inf)
        ),
        *((name, bad) for name in ("max_steps", "anchors_per_step", "rank", "rank_share") for bad in (0, -3)),
        ("warmup_steps", -1),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_what_was_expected(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*expected"):
        TeachConfig(**{name: value})


def test_the_edges_of_the_settings_are_allowed() -> None:
    TeachConfig(target_loss=0, anchor_weight=0, warmup_steps=0, max_steps=1, rank=1, rank_share=1, anchors_per_step=1)
