"""Scores of the embedded engine: a plain forward on the served weights, none in the middle of a write, and no second copy."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_engine import PROMPT, VOCAB, collect, frozen, ids, one, perturb, plain_logprobs, serving, slow, tiny_model

from insitu.live.engines.base import SamplingParams, Token


def test_score_is_a_plain_forward_beside_generation_and_waits_for_the_end_of_a_pause() -> None:
    model = tiny_model()
    text = [(11 * i) % VOCAB for i in range(60)]
    with serving(slow(model, 0.001)) as engine:

        async def main() -> list[Token]:
            running = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=100)))
            scored = [await asyncio.to_thread(engine.score, text, 3) for _ in range(5)][-1]
            assert len(await running) == 100
            return scored

        check_score(model, text, asyncio.run(main()), "0")
        engine.pause()
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(engine.score, text, 3)
            with pytest.raises(TimeoutError):
                asked.result(timeout=0.3)
            perturb(model, 1, 0.05)
            engine.publish("1")
            engine.resume()
            check_score(model, text, asked.result(timeout=30), "1")


def check_score(model: Any, text: Sequence[int], scored: Sequence[Token], version: str) -> None:
    rows = plain_logprobs(model, text)
    assert ids(scored) == list(text[1:])
    for i, token in enumerate(scored):
        assert token.version == version
        assert token.logprob == pytest.approx(rows[i, token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(rows[i].topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scoring_in_bf16_equals_a_fresh_model_and_copies_no_weight(attention: str) -> None:
    model = tiny_model().bfloat16()
    model.set_attn_implementation(attention)
    fresh = frozen(model).bfloat16()
    fresh.set_attn_implementation(attention)
    text = [(11 * i) % VOCAB for i in range(60)]
    with serving(model) as engine:
        one(engine, PROMPT, max_tokens=3)
        served, scorer = dict(model.named_parameters()), dict(engine._scorer.named_parameters())
        assert served.keys() == scorer.keys()
        assert all(served[name].data_ptr() == scorer[name].data_ptr() for name in served)
        assert engine._scorer.config is not model.config
        scored = engine.score(text)
    with torch.no_grad():
        rows = fresh(torch.tensor([text])).logits[0].float().log_softmax(-1)
    assert [t.logprob for t in scored] == pytest.approx([rows[i, t.id].item() for i, t in enumerate(scored)], abs=1e-6)
