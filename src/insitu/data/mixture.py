"""The training stream of a run, mixed from its sources, and the validation set of each.

Numbers: optimizer steps count from 1; step t is made of the sequences (t - 1) S to t S - 1, S = ``sequences_per_step`` over all
ranks. What is drawn is a function of the configuration, the text, the seed and the losses, and of nothing else.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from insitu.data.bandit import Bandit
from insitu.data.choice import BanditChoice, WeightedChoice
from insitu.data.config import DataConfig, SourceConfig
from insitu.data.durable import directory_made
from insitu.data.messages import DataError
from insitu.data.packing import PackedStream, ValidationSet, mixed_seed
from insitu.data.text import check_hub, documents, fingerprint, locate
from insitu.data.tokenizer import check_tokenizer
from insitu.data.tokens import Tokens, read_tokens, tokenizer_key, write_tokens

_log = logging.getLogger(__name__)
_KEPT = 8  # steps whose states can still be asked for; a DataLoader draws one step ahead


class Mixture(IterableDataset[dict[str, Any]]):
    """Endless sequences ``{"input_ids": int64 [T], "labels": int64 [T], "source": int}``; labels equal the inputs (the model
    shifts them).

    Under ``mixture: bandit`` all sequences of a step are of one source, so that its loss says something about that source,
    and ``observe`` must be told the mean training loss of every step. Each rank makes a Mixture of its own with the same
    arguments but ``rank``; the choices are the same on all if they observe the same losses, and rank r yields every
    world_size-th sequence of a step, from the r-th on. A DataLoader must not divide them again, and must not have worker
    processes, which losses would not reach.

    Args:
        tokens: the training tokens of each source, in the order of ``config.sources``.
        config: what is mixed how.
        sequence_length: T.
        seed: of the order of documents and of the bandit's dice.
        sequences_per_step: S = sequences on one device x accumulation x ranks.
        rank: which of the ranks this is.
        world_size: how many ranks there are.

    Raises:
        DataError: a source too short to be chosen once under its ``max_epochs``; warmup sources too short for the warmup.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        config: DataConfig,
        *,
        sequence_length: int,
        seed: int,
        sequences_per_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if sequences_per_step < 1 or sequences_per_step % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"sequences_per_step={sequences_per_step} on {world_size} ranks, this one {rank}; expected a multiple of "
                "the ranks, and a rank below them"
            )
        self.config, self.sequences_per_step, self.rank, self.world_size = config, sequences_per_step, rank, world_size
        self.names = [source.name for source in config.sources]
        self.streams = [
            PackedStream(part, sequence_length, mixed_seed(seed, name))
            for part, name in zip(tokens, self.names, strict=True)
        ]
        self.limits = [
            None if source.max_epochs is None else stream.capacity(source.max_epochs)
            for source, stream in zip(config.sources, self.streams, strict=True)
        ]
        self.positions = [0] * len(tokens)
        self._step = 0  # the last one that was drawn
        self._choice = _choice(config, seed)
        self._states: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_KEPT)
        self._made_of = {
            "mixture": config.mixture,
            "sequence_length": sequence_length,
            "sequences_per_step": sequences_per_step,
            "seed": seed,
            "sources": {name: part.digest for name, part in zip(self.names, tokens, strict=True)},
        }
        self._check_limits()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Go on where the last step that was drawn, or the state that was loaded, ended."""
        if get_worker_info() is not None:
            raise RuntimeError("the mixture cannot be read by DataLoader workers; set dataloader_num_workers to 0")
        while True:
            for source, position in self._draw_step()[self.rank :: self.world_size]:
                input_ids = self.streams[source].sequence(position)
                yield {"input_ids": input_ids, "labels": input_ids.clone(), "source": source}

    def _draw_step(self) -> list[tuple[int, int]]:
        """(source, position in its stream) of each sequence of the next step, on all ranks."""
        self._states.append((self._step, self._snapshot()))
        left = [
            None if limit is None else limit - position
            for limit, position in zip(self.limits, self.positions, strict=True)
        ]
        sources = self._choice.sources(self._step + 1, self.sequences_per_step, left)
        self._step += 1
        plan = []
        for source in sources:
            plan.append((source, self.positions[source]))
            self.positions[source] += 1
        return plan

    def observe(self, step: int, loss: float) -> None:
        """Tell the mean training loss of optimizer step ``step`` (from 1) over all ranks: the same number on each.

        Raises:
            ValueError: the loss is not finite.
        """
        self._choice.observe(step, loss)

    @property
    def choices(self) -> list[tuple[int, int, int]]:
        """(first step, source, length in steps) of every hold so far; empty for fixed weights."""
        return self._choice.choices

    @property
    def rewards(self) -> list[tuple[int, int, float]]:
        """(last step, source, reward) of every hold whose reward is known; empty for fixed weights."""
        return self._choice.rewards

    @property
    def steps(self) -> int | None:
        """The most steps that the sources' ``max_epochs`` allow; None without a limit."""
        return self._allowed(range(len(self.names)))

    def _allowed(self, chosen: Sequence[int]) -> int | None:
        S, bandit = self.sequences_per_step, self.config.mixture == "bandit"
        total = 0
        for k in chosen:
            limit = self.limits[k]
            if bandit or self.config.sources[k].weight:
                if limit is None:
                    return None
                total += limit // S * S if bandit else limit
        return total // S

    def _check_limits(self) -> None:
        least = self.sequences_per_step if self.config.mixture == "bandit" else 1
        for source, limit in zip(self.config.sources, self.limits, strict=True):
            if limit is not None and limit < least:
                raise DataError(
                    f"source {source.name}: max_epochs={source.max_epochs:g} of its text are {limit} sequences, and it is "
                    f"chosen for {least} at a time, so never; raise max_epochs, add text, or leave the source out"
                )
        if not self.config.warmup_steps:
            return
        warm = [k for k, source in enumerate(self.config.sources) if source.warmup]
        allowed = self._allowed(warm)
        if allowed is not None and allowed < self.config.warmup_steps:
            raise DataError(
                f"data.warmup_steps={self.config.warmup_steps}, but the warmup sources' max_epochs and weights allow {allowed} "
                "steps; lower it, raise max_epochs, or mark more sources",
                "data.warmup_steps",
            )

    def _snapshot(self) -> dict[str, Any]:
        return {"positions": [*self.positions], "choice": self._choice.snapshot()}

    def state_dict(self, sequences: int) -> dict[str, Any]:
        """The state before sequence number ``sequences`` (over all ranks) is drawn: numbers, strings, lists and dictionaries
        that JSON keeps exactly. After step t that is ``t * sequences_per_step``, however far ahead was drawn.

        Raises:
            ValueError: it is not the end of a step, or not one of the last few.
        """
        step, inside = divmod(sequences, self.sequences_per_step)
        kept = dict(self._states) | {self._step: self._snapshot()}
        if inside or step not in kept:
            raise ValueError(
                f"no state before sequence {sequences}; kept are those before "
                f"{', '.join(str(s * self.sequences_per_step) for s in kept)}"
            )
        state = kept[step]
        choice = self._choice.completed(state["choice"], step)
        return {"step": step, "positions": state["positions"], "choice": choice, "made_of": self._made_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the number of ranks may be another.

        Raises:
            DataError: the state is of other text, another tokenizer, or other settings.
        """
        for key, value in self._made_of.items():
            other = state["made_of"][key]
            if other == value:
                continue
            if isinstance(value, dict) and other.keys() == value.keys():
                changed = [name for name in value if value[name] != other[name]]
                raise DataError(
                    f"the checkpoint was trained on other text or with another tokenizer: {', '.join(changed)}"
                )
            shown = (list(other), list(value)) if isinstance(value, dict) else (other, value)
            raise DataError(
                f"the checkpoint's data has {key} {shown[0]}, this run {shown[1]}; they must agree to go on"
            )
        self._step, self.positions = state["step"], [*state["positions"]]
        self._choice.load(state["choice"])
        self._states.clear()


def _choice(config: DataConfig, seed: int) -> BanditChoice | WeightedChoice:
    warmup = [source.warmup for source in config.sources]
    if config.mixture == "weighted":
        return WeightedChoice([source.weight for source in config.sources], warmup, config.warmup_steps)
    floors = [source.floor for source in config.sources]
    bandit = Bandit(floors, exploration=config.exploration, hold=config.hold, seed=seed)
    return BanditChoice(bandit, warmup, config.warmup_steps, [source.name for source in config.sources])


def make_mixture(
    config: DataConfig,
    tokenizer: Any,
    sequence_length: int,
    seed: int,
    *,
    cache: Path,
    sequences_per_step: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Mixture, dict[str, Dataset[Any]]]:
    """The training stream, and a validation set for each source that has a validation document.

    The text is encoded once and kept in ``cache``; one process does it while the others wait.

    Args:
        config: the sources and how they are mixed.
        tokenizer: a fast transformers tokenizer with an end-of-text token.
        sequence_length: T.
        seed: of the order of documents and of the bandit's dice.
        cache: a directory for the tokens; kept from run to run, and safe to delete.
        sequences_per_step: S = sequences on one device x accumulation x ranks.
        rank: which of the ranks this is.
        world_size: how many ranks there are.

    Raises:
        DataError: a missing or empty source, unreadable text, limits that do not fit.
    """
    check_tokenizer(tokenizer)
    places = [locate(source, config.directory) for source in config.sources]
    for source, files in zip(config.sources, places, strict=True):  # all of them before the first long encoding
        if files is None:
            check_hub(source)
    training: list[Tokens] = []
    validation: dict[str, Dataset[Any]] = {}
    for source, files in zip(config.sources, places, strict=True):
        train, held_out = _tokens(source, files, config, tokenizer, cache)
        _check_not_empty(source, train, held_out, config.validation)
        training.append(train)
        one = ValidationSet(held_out, sequence_length, tokenizer.eos_token_id)
        if len(one):
            validation[source.name] = one
        elif config.validation:
            _log.warning(
                "source %s: none of its %d documents falls into the validation share of %g, so it has no validation set",
                *(source.name, len(train.ends), config.validation),
            )
    mixture = Mixture(
        training,
        config,
        sequence_length=sequence_length,
        seed=seed,
        sequences_per_step=sequences_per_step,
        rank=rank,
        world_size=world_size,
    )
    return mixture, validation


def _tokens(
    source: SourceConfig, files: list[Path] | None, config: DataConfig, tokenizer: Any, cache: Path
) -> tuple[Tokens, Tokens]:
    key = f"1 {fingerprint(source, files)} {config.validation} {tokenizer_key(tokenizer)}"
    directory = directory_made(
        cache / source.name,
        key,
        lambda partial: write_tokens(documents(source, config.directory), tokenizer, config.validation, partial),
    )
    return read_tokens(directory, "train"), read_tokens(directory, "validation")


def _check_not_empty(source: SourceConfig, train: Tokens, held_out: Tokens, share: float) -> None:
    if len(train.ids):
        return
    if len(held_out.ids):
        raise DataError(
            f"source {source.name}: all of its documents ({len(held_out.ends)}) fall into the validation share of {share:g}; "
            "lower data.validation or add documents (a .txt file is one document)"
        )
    raise DataError(f"source {source.name} is empty: no document with a character other than white space")
