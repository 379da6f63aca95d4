"""The ``data`` section of a training run's configuration: text sources, how they are mixed, and their tokenizer.

Everything that can be known to be wrong without reading a text is refused here, before anything is loaded.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from insitu.data.messages import DataError

PACKAGES = ("andrea16",)
_Section = TypeVar("_Section")


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents, from exactly one place: ``path``, ``hub`` or ``package``."""

    name: str = field(
        metadata={"help": "What the source is called in logs and validation sets, and in a package's directory."}
    )
    path: str | None = field(
        default=None,
        metadata={
            "help": "A file (.txt: one document; .jsonl: one a line; either may end in .gz) or a directory of such files."
        },
    )
    hub: str | None = field(
        default=None,
        metadata={"help": "A data set of the Hub, owner/name; read from data.directory instead where that is given."},
    )
    package: str | None = field(
        default=None,
        metadata={"help": "A set that `insitu train get-data` fetched, such as andrea16; name says which source."},
    )
    subset: str | None = field(
        default=None, metadata={"help": "The Hub's name of a part of the data set, such as C4's en."}
    )
    split: str = field(default="train", metadata={"help": "The Hub's split."})
    text_column: str = field(
        default="text", metadata={"help": "The key of a document's text in .jsonl files and Hub data sets."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "No document behind this one is read. A streamed Hub data set needs it."}
    )
    weight: float = field(
        default=1.0,
        metadata={"help": "Share of the sequences under mixture: weighted, relative to the other sources' weights."},
    )
    floor: float = field(
        default=0.0,
        metadata={"help": "Under mixture: bandit, the weight in the draw that it keeps whatever its reward, 0 to 1."},
    )
    warmup: bool = field(
        default=False, metadata={"help": "Whether it is one of the sources of the first warmup_steps steps."}
    )
    max_epochs: float | None = field(
        default=None, metadata={"help": "How often its text may be seen; then it is no longer chosen. null: no limit."}
    )


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer to load, or the size of one to train on the sources."""

    path: str | None = field(default=None, metadata={"help": "A directory or a Hub name."})
    vocab_size: int | None = field(
        default=None, metadata={"help": "Tokens of a byte-level BPE tokenizer that is trained on the sources."}
    )
    max_bytes: int = field(
        default=50_000_000, metadata={"help": "How much text it is trained on, taken from the sources in turn."}
    )


@dataclass(kw_only=True)
class DataConfig:
    """Text, and how it is mixed. See :class:`insitu.data.mixture.Mixture` for what is done with it."""

    sources: list[SourceConfig] = field(metadata={"help": "Where the text comes from."})
    mixture: Literal["bandit", "weighted"] = field(
        default="bandit", metadata={"help": "How sources are chosen: UCB1 on loss reduction, or fixed weights."}
    )
    exploration: float = field(default=1.0, metadata={"help": "C of UCB1, in units of the rewards' root mean square."})
    hold: list[int] = field(
        default_factory=lambda: [7, 42],
        metadata={"help": "The fewest and the most optimizer steps that a source chosen by the bandit is held."},
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "For so many optimizer steps only the sources marked warmup are chosen."}
    )
    validation: float = field(
        default=0.01, metadata={"help": "Share of each source's documents that is never trained on."}
    )
    tokenizer: TokenizerConfig | None = field(
        default=None, metadata={"help": "null: the tokenizer of the model that is trained on."}
    )
    sequence_length: int = field(default=1024, metadata={"help": "T, tokens in one training sequence."})
    directory: str | None = field(
        default=None,
        metadata={
            "help": "A local directory that holds the Hub data sets and the packaged ones; else the environment's INSITU_DATA."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.sources, list | tuple) or not self.sources:
            raise DataError(f"data.sources={self.sources!r}; expected a list of at least one source", "data.sources")
        self.sources = [_section(SourceConfig, s, f"data.sources[{i}]") for i, s in enumerate(self.sources)]
        if self.tokenizer is not None:
            self.tokenizer = _section(TokenizerConfig, self.tokenizer, "data.tokenizer")
            _check_tokenizer(self.tokenizer)
        for i, source in enumerate(self.sources):
            _check_source(source, f"data.sources[{i}]")
        names = [source.name for source in self.sources]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise DataError(f"data.sources has two sources named {twice[0]!r}; names must differ", "data.sources")
        _check_mixture(self)


def _section(kind: type[_Section], value: Any, where: str) -> _Section:
    """The dataclass itself, or one made of a mapping as YAML gives it; an unknown key is named with its nearest neighbour."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise DataError(f"{where}={value!r}; expected a mapping of {_keys(kind)}", where)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
            raise DataError(f"{where} has no key {key!r}{meant}", f"{where}.{key}")
    if "name" in known and "name" not in value:
        raise DataError(f"{where} has no name; every source needs one", f"{where}.name")
    return kind(**value)


def _keys(kind: type[Any]) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _check_source(source: SourceConfig, where: str) -> None:
    if not isinstance(source.name, str) or not source.name or "/" in source.name or source.name.startswith("."):
        raise DataError(f"{where}.name={source.name!r}; expected a name without a slash", f"{where}.name")
    for key in ("path", "hub", "package", "subset", "split", "text_column"):
        value = getattr(source, key)
        if value is not None and (not isinstance(value, str) or not value):
            raise DataError(f"{where}.{key}={value!r}; expected a string", f"{where}.{key}")
    given = [key for key in ("path", "hub", "package") if getattr(source, key) is not None]
    if len(given) != 1:
        raise DataError(
            f"{where} ({source.name}) has {' and '.join(given) or 'no place'}; expected exactly one of path, hub, package",
            where,
        )
    if source.package is not None and source.package not in PACKAGES:
        raise DataError(f"{where}.package={source.package!r}; expected {', '.join(PACKAGES)}", f"{where}.package")
    _number(source.weight, f"{where}.weight", low=0.0)
    _number(source.floor, f"{where}.floor", low=0.0, high=1.0)
    if not isinstance(source.warmup, bool):
        raise DataError(f"{where}.warmup={source.warmup!r}; expected true or false", f"{where}.warmup")
    if source.max_epochs is not None:
        _number(source.max_epochs, f"{where}.max_epochs", low=0.0)
    if source.max_documents is not None:
        _whole(source.max_documents, f"{where}.max_documents", low=1)


def _check_tokenizer(tokenizer: TokenizerConfig) -> None:
    where = "data.tokenizer"
    if (tokenizer.path is None) == (tokenizer.vocab_size is None):
        raise DataError(f"{where} needs either path (load one) or vocab_size (train one), and not both", where)
    if tokenizer.vocab_size is not None:
        # 256 bytes and the end-of-text token; what is above are merges.
        _whole(tokenizer.vocab_size, f"{where}.vocab_size", low=257)
    _whole(tokenizer.max_bytes, f"{where}.max_bytes", low=1)


def _check_mixture(config: DataConfig) -> None:
    if config.mixture not in ("bandit", "weighted"):
        raise DataError(f"data.mixture={config.mixture!r}; expected bandit or weighted", "data.mixture")
    _number(config.exploration, "data.exploration", low=0.0)
    if not isinstance(config.hold, list | tuple) or len(config.hold) != 2:
        raise DataError(f"data.hold={config.hold!r}; expected two numbers, the fewest and the most steps", "data.hold")
    shortest, longest = config.hold
    _whole(shortest, "data.hold[0]", low=1)
    _whole(longest, "data.hold[1]", low=shortest)
    config.hold = [shortest, longest]
    _whole(config.warmup_steps, "data.warmup_steps", low=0)
    _whole(config.sequence_length, "data.sequence_length", low=2)
    _number(config.validation, "data.validation", low=0.0)
    if config.validation >= 1:
        raise DataError(f"data.validation={config.validation!r}; expected a share below 1", "data.validation")
    if config.warmup_steps and not any(source.warmup for source in config.sources):
        raise DataError(
            f"data.warmup_steps={config.warmup_steps} but no source is marked `warmup: true`; mark some or set it to 0",
            "data.warmup_steps",
        )
    if config.mixture == "weighted" and not any(source.weight > 0 for source in config.sources):
        raise DataError("every weight in data.sources is 0; give at least one source a weight", "data.sources")


def _number(value: Any, where: str, *, low: float, high: float = math.inf) -> None:
    # bool is an int in Python; NaN fails both comparisons.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high or math.isinf(value):
        limits = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
        raise DataError(f"{where}={value!r}; expected a number, {limits}", where)


def _whole(value: Any, where: str, *, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise DataError(f"{where}={value!r}; expected a whole number, {low} or more", where)
