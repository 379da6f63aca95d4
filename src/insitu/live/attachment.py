"""One attachment of a learner to a server: the model on the server's arena, checked before anything is done with it."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from insitu.data.batch import collate
from insitu.data.chat import Example, encode_continuation, encode_messages, encode_question
from insitu.data.loss import target_logprobs
from insitu.live import canaries, prompts, proof
from insitu.live.control import EngineClient
from insitu.live.guard import MAX_GAP_AT_START, gap
from insitu.live.records import Feedback
from insitu.live.store import Store
from insitu.live.versions import Versions
from insitu.live.weights import attach

log = logging.getLogger("insitu.learner")

_CANARY_TOKENS = 12  # of each continuation that judges: scored while serving stands still


class Attachment:
    """What a job needs of the served model: the engine, the weights it reads, and a model of our own on the same memory.

    Raises AttachError, after telling the server why, when the weights cannot be trained in place.
    """

    def __init__(self, engine: EngineClient, store: Store, versions: Versions, base: Path) -> None:
        from transformers import AutoTokenizer

        self.engine = engine
        self.store = store
        self.versions = versions
        self.arena = engine.arena
        self.views = self.arena.views()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = attach.build(base, self.arena, requires_grad=True)
        self.aliases = attach.tied(self.model)
        self.context_length = int(self.model.config.max_position_embeddings)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        self._threads = torch.get_num_threads()
        try:
            self._verify()
            if not engine.proven:
                self._prove()
            self._agree()
        except attach.AttachError as error:
            engine.refuse(str(error))
            raise
        engine.ready()

    def _verify(self) -> None:
        """What lies in the arena must be, bit for bit, the version that the store says was committed last."""
        head = self.head()
        recorded = self.store.version(head)
        if recorded is None or self.arena.sha256() != recorded.sha256:
            raise attach.AttachError(
                f"the weights in memory are not version {head} (sha256 differs); refusing to train them"
            )

    def _prove(self) -> None:
        """This server has not answered anybody yet: show that it reads what lies in the arena."""
        head = self.head()
        speed = proof.compare(self.views, self.versions.iter_version(head), self.aliases)
        ids = encode_question(self.tokenizer, prompts.CANARIES[0])
        last = [name for name, parameter in self.model.named_parameters() if parameter.dim() == 1][-1]

        def expose() -> None:
            self.engine.publish()
            self.engine.resume()

        moved = proof.probe(self.arena, last, lambda: self.engine.score(ids), expose, self.engine.pause)
        log.info("compared at %.2f GB/s; one element of %s moves the server by %.2g nats", speed / 1e9, last, moved)

    def _agree(self) -> None:
        """Server and learner say the same of the same text, as far as their kernels allow."""
        ids = encode_question(self.tokenizer, prompts.CANARIES[0])
        if not (found := self.gap(ids)) <= MAX_GAP_AT_START:
            raise attach.AttachError(
                f"server and learner disagree by {found:.2f} nats per token on the same text; the limit is {MAX_GAP_AT_START}"
            )

    def head(self) -> int:
        head = self.store.head()
        if head is None:
            raise attach.AttachError("the state directory has no committed version; start the server first")
        return head

    def replies(self, questions: Sequence[str], max_tokens: int) -> list[Example]:
        """The served model's own greedy replies to these questions, as examples."""
        asked = [encode_question(self.tokenizer, question) for question in questions]
        told = self.engine.generate(asked, max_tokens)
        return [
            Example([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))
            for prompt, reply in zip(asked, told, strict=True)
        ]

    def canaries(self) -> list[canaries.Frozen]:
        """The canaries that ship and those that users added; new ones are frozen now, from the live weights."""
        at = self.arena.header
        assert (at.label, at.writer) == (str(self.head()), 0), "canaries are frozen at committed versions only"
        wanted = prompts.built_in() | {canary.name: canary.prompt for canary in self.store.canaries()}
        head = self.head()

        def freeze(missing: Mapping[str, str]) -> list[canaries.Frozen]:
            said = self.replies(list(missing.values()), _CANARY_TOKENS)
            return canaries.freeze(self.model, missing, said, head, self.pad_token_id)

        path = self.versions.directory.parent / canaries.FILE
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        return canaries.keep(path, wanted, freeze, version=head, vocabulary=vocabulary)

    def encode(self, item: Feedback) -> Example:
        """DataError if it cannot be learned from."""
        payload = item.payload
        frozen = bool(payload.get("freeze_context", False))
        if item.kind == "messages":
            return encode_messages(
                self.tokenizer, payload["messages"], max_length=self.context_length, freeze_context=frozen
            )
        return encode_continuation(
            payload["context_ids"],
            payload["continuation_ids"],
            vocab_size=self.model.config.vocab_size,
            max_length=self.context_length,
            freeze_context=frozen,
        )

    @contextmanager
    def all_cores(self) -> Iterator[None]:
        """Serving stands still, so its cores are free."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def gap(self, ids: list[int]) -> float:
        """Between what the server says of these tokens and what the learner computes, see :func:`insitu.live.guard.gap`."""
        whole = Example(ids, [False] + [True] * (len(ids) - 1))
        batch = collate([whole], self.pad_token_id, device=self.model.device)
        return gap(self.engine.score(ids), target_logprobs(self.model, batch)[0].tolist())
