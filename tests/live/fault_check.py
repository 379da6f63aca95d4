"""The check after a fault trial: every reply again, from the bytes of the version it names, token for token."""

import asyncio
import json
from contextlib import aclosing
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoTokenizer

from insitu.data.chat import encode_prompt
from insitu.live import packaged, source
from insitu.live.api.detokenize import Detokenizer
from insitu.live.config import ServeConfig, TeachConfig
from insitu.live.engines.base import SamplingParams, Token
from insitu.live.engines.embedded import EmbeddedEngine
from insitu.live.server import _eos_token_ids
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import attach, handles
from insitu.live.weights.arena import DTYPES, Arena


def serve_config(state_dir: Path, options: dict[str, Any]) -> ServeConfig:
    return ServeConfig(
        state_dir=state_dir,
        port=0,
        dtype=options["dtype"],
        threads=1,
        max_requests=4,
        cache_tokens=2048,
        teach=TeachConfig(**options["teach"]),
        yes=True,
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Checker:
    """An engine like the server's, on an arena of its own that becomes whatever version a reply names."""

    def __init__(self, side: Path, options: dict[str, Any]) -> None:
        self.side = side
        self.tolerance: float = options["tolerance"]
        base = source.resolve(options["model"], yes=True)
        skeleton = attach.skeleton(base, DTYPES[options["dtype"]])
        self.arena = Arena.create(attach.layout(skeleton))
        self.aliases = attach.tied(skeleton)
        self.base = base
        model = attach.build(base, self.arena, requires_grad=False)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        config = serve_config(side, options)
        self.ends = tuple(_eos_token_ids(base, model, self.tokenizer))
        self.engine = EmbeddedEngine(
            model,
            model_name=packaged.SMOLLM2,
            context_length=min(int(model.config.max_position_embeddings), config.cache_tokens),
            eos_token_ids=self.ends,
            max_requests=config.max_requests,
            cache_tokens=config.cache_tokens,
        )
        self.engine.start()
        self.now: object = None

    def become(self, what: object, tensors: Any) -> None:
        if self.now != what:
            self.engine.pause()
            attach.fill(self.arena.views(), tensors, self.aliases)
            self.engine.publish(str(what))
            self.engine.resume()
            self.now = what

    def check(self, state_dir: Path, replies: list[dict[str, Any]], versions: list[int]) -> dict[str, Any]:
        """What is wrong, in words, and figures."""
        store = Store(state_dir / "insitu.db")
        try:
            kept = Versions(state_dir, self.base, store)
            wrong: list[str] = []
            for version in versions:
                self.become((state_dir.name, version), kept.iter_version(version))
                found = store.version(version)
                if found is None or self.arena.sha256() != found.sha256:
                    wrong.append(f"version {version} is not the bytes that were committed")
            figures = self._replies(state_dir, store, kept, replies, wrong)
            return {"wrong": wrong, **figures}
        finally:
            store.close()

    def _replies(
        self, state_dir: Path, store: Store, kept: Versions, replies: list[dict[str, Any]], wrong: list[str]
    ) -> dict[str, Any]:
        made: dict[str, dict[str, Any]] = {}
        for line in lines(self.side / "tokens.jsonl"):
            if "prompt" in line:
                made[line["request"]] = {**line, "tokens": []}
            else:
                made[line["request"]]["tokens"].append(line)
        by_prompt: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for request in made.values():
            by_prompt.setdefault(tuple(request["prompt"]), []).append(request)
        figures = {"replies": 0, "tokens": 0, "spanning": 0, "ties": 0, "worst_logprob_error": 0.0}
        for reply in replies:
            prompt = encode_prompt(self.tokenizer, [{"role": "user", "content": reply["ask"]}])
            found = by_prompt.get(tuple(prompt), [])
            if len(found) != 1:
                if reply["text"] or reply["versions"]:
                    wrong.append(f"{reply['ask']!r} was generated {len(found)} times")
                continue
            tokens = found[0]["tokens"]
            self._compare_text(reply, tokens, wrong)
            labels = self._regenerate(state_dir, store, kept, found[0], wrong, figures, reply["ask"])
            figures["replies"] += bool(tokens)
            figures["tokens"] += len(tokens)
            figures["spanning"] += labels > 1
        return figures

    def _compare_text(self, reply: dict[str, Any], tokens: list[dict[str, Any]], wrong: list[str]) -> None:
        """What the client got is what the engine made, and the labels are those of the tokens."""
        decoder = Detokenizer(self.tokenizer).decoder()
        text = "".join(decoder.push(token["id"]) for token in tokens if token["id"] not in self.ends)
        text += decoder.flush()  # what is left of a character that the reply did not end
        labels = list(dict.fromkeys(token["label"] for token in tokens))
        if reply["done"]:
            if reply["text"] != text or reply["versions"] != labels:
                wrong.append(
                    f"{reply['ask']!r}: the client got {reply['text']!r} of {reply['versions']}, not {text!r} of {labels}"
                )
        elif not text.startswith(reply["text"]) or reply["versions"] != labels[: len(reply["versions"])]:
            wrong.append(f"{reply['ask']!r}: the client got {reply['text']!r} before the server died, not {text!r}")

    def _regenerate(
        self,
        state_dir: Path,
        store: Store,
        kept: Versions,
        request: dict[str, Any],
        wrong: list[str],
        figures: Any,
        ask: str,
    ) -> int:
        """Piece by piece: a publish makes the engine begin anew with prompt + tokens so far, and so do we."""
        before = list(request["prompt"])
        pieces = [
            (key, list(part)) for key, part in groupby(request["tokens"], key=lambda t: (t["label"], t["serial"]))
        ]
        for (label, serial), part in pieces:
            try:
                self._become_label(state_dir, store, kept, request["life"], label, serial)
            except LookupError as error:
                wrong.append(f"{ask!r}: {error}")
                return len(pieces)
            at = 0
            while at < len(part):
                again = self._generate(before, len(part) - at)
                for token, expected in zip(again, part[at:], strict=False):
                    at += 1
                    if token.id != expected["id"]:
                        gap = token.logprob - self._logprob(before, expected["id"])
                        if not gap <= self.tolerance:
                            wrong.append(
                                f"{ask!r}: {expected['id']} was served, {label} says {token.id} after {len(before)} tokens"
                            )
                            return len(pieces)
                        figures["ties"] += 1
                        before.append(expected["id"])
                        break  # go on from the token that was served
                    error = abs(token.logprob - expected["logprob"])
                    figures["worst_logprob_error"] = max(figures["worst_logprob_error"], error)
                    if not error <= self.tolerance:
                        wrong.append(
                            f"{ask!r}: {label} says {token.logprob:.6f} of token {token.id}, served {expected['logprob']:.6f}"
                        )
                        return len(pieces)
                    before.append(token.id)
                else:
                    if at < len(part):
                        wrong.append(f"{ask!r}: {label} ends the reply earlier")
                        return len(pieces)
        return len(pieces)

    def _become_label(self, state_dir: Path, store: Store, kept: Versions, life: str, label: str, serial: int) -> None:
        if "+" not in label:
            found = store.version(int(label))
            if found is None or found.status != "committed":
                raise LookupError(f"was answered by version {label}, which is not committed")
            self.become((state_dir.name, int(label)), kept.iter_version(int(label)))
            return
        published = next(p for p in lines(self.side / "publishes.jsonl") if (p["life"], p["serial"]) == (life, serial))
        stamps = [s for s in lines(self.side / "stamps.jsonl") if s["label"] == label and s["time"] < published["time"]]
        if not stamps:
            raise LookupError(f"was answered by {label}, which no learner has stamped")
        file = stamps[-1]["file"]
        self.become(file, load_file(self.side / "bytes" / file).items())

    def _generate(self, prompt: list[int], max_tokens: int) -> list[Token]:
        async def collect() -> list[Token]:
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=self.ends)
            async with aclosing(self.engine.generate(prompt, params)) as stream:
                return [token async for token in stream]

        return asyncio.run(collect())

    def _logprob(self, before: list[int], id: int) -> float:
        return self.engine.score([*before, id])[-1].logprob


def answer(side: Path, options: dict[str, Any]) -> None:
    """The checker's process: jobs in, findings out, over ``side/checker.sock``."""
    checker = Checker(side, options)
    listener = handles.listen(side / "check" / "checker.sock")
    line, _ = listener.accept()
    while True:
        job, _ = handles.receive(line)
        handles.send(line, checker.check(Path(job["state_dir"]), job["replies"], job["versions"]))
