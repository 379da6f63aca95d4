"""From a package's files to plain documents, one function for each source of andrea16.

Dialogue is written as ANDREA's was: a line with ``> `` is one speaker's, one with ``< `` the other's.
"""

import ast
import email
import email.policy
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from insitu.data.packages import texts

Paths = Sequence[Path]

# Lists of public mails, sentences and rule sets have crude entries, which are left out.
_CRUDE = re.compile(r"\b(fuck|shit|cunt|nigg|fag|whore|slut|rape|porn|penis|vagina|bitch)", re.IGNORECASE)
_NUM_DIALOGUES, _TURNS = 1400, 4


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def wiki(paths: Paths) -> Iterator[str]:
    """Lead sections of the English Wikipedia's vital articles, as answers to what their title is."""
    for _, text in texts(paths, lambda name: name.endswith("data/summaries_en-us.json")):
        for entry in json.loads(text).values():
            yield f"> What is {_squeeze(entry['title'])}?\n< {_squeeze(entry['extract'])}"


def fortunes(paths: Paths) -> Iterator[str]:
    """The fortune command's texts; pictures made of letters and the sets of ethnic and drug jokes are left out."""
    skipped = ("art", "ascii-art", "ethnic", "drugs", "pets.dat")

    def wanted(name: str) -> bool:
        last = name.rsplit("/", 1)[-1]
        return "/games/fortunes/" in name and "." not in last and last not in skipped

    for _, text in texts(paths, wanted):
        for fortune in re.split(r"^%\n", text, flags=re.MULTILINE):
            if fortune.strip() and not _CRUDE.search(fortune):
                yield fortune.strip("\n").replace("\t", "    ")


def scenes(paths: Paths) -> Iterator[str]:
    """Shakespeare's plays, a scene a document, each speech behind its speaker's name."""
    for _, text in texts(paths, lambda name: "/plays/" in name and name.endswith(".md")):
        title = _squeeze(text.split("\n", 1)[0].strip("# "))
        for scene in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
            heading, _, body = scene.partition("\n")
            body = re.sub(r"\*\*([^*\n]+)\*\*\s*\n", r"\1: ", body)
            body = re.sub(r"_([^_]+)_", r"[\1]", body)
            if body.strip():
                lines = "\n".join(line.rstrip() for line in body.strip().splitlines())
                yield f"{title}. {_squeeze(heading)}\n\n{lines}"


_PAIR = re.compile(r"<category>\s*<pattern>([^<*_]+)</pattern>\s*<template>([^<]+)</template>\s*</category>")
_QUESTIONS = (
    "WHAT",
    "WHO",
    "WHERE",
    "WHEN",
    "WHY",
    "HOW",
    "WHICH",
    "IS",
    "ARE",
    "DO",
    "DOES",
    "CAN",
    "DID",
    "WILL",
    "HAVE",
)


def _pairs(paths: Paths) -> Iterator[tuple[str, str]]:
    """A.L.I.C.E.'s categories of a plain question and a plain reply."""

    def wanted(name: str) -> bool:
        return name.endswith(".aiml") and "/botdata/" in name and not re.search(r"sex|drugs|pickup|german|dev-", name)

    for _, text in texts(paths, wanted, "latin-1"):
        for pattern, template in _PAIR.findall(text):
            words, reply = html.unescape(_squeeze(pattern)), html.unescape(_squeeze(template))
            if not reply or _CRUDE.search(words) or _CRUDE.search(reply):
                continue
            question = words.capitalize() + ("?" if words.split()[0] in _QUESTIONS else ".")
            yield re.sub(r"\bi\b", "I", question), reply


def _for_dialogues(question: str) -> bool:
    """One pair in ten, always the same ones, so that no pair is in both sources."""
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] < 26


def aiml_pairs(paths: Paths) -> Iterator[str]:
    for question, reply in _pairs(paths):
        if not _for_dialogues(question):
            yield f"> {question}\n< {reply}"


def aiml_dialogues(paths: Paths) -> Iterator[str]:
    """Dialogues of four turns each, of pairs that follow each other in the rule set."""
    turns: list[str] = []
    count = 0
    for question, reply in _pairs(paths):
        if not _for_dialogues(question):
            continue
        turns.append(f"> {question}\n< {reply}")
        if len(turns) == _TURNS:
            yield "\n".join(turns)
            turns, count = [], count + 1
            if count == _NUM_DIALOGUES:
                return


def chatterbot(paths: Paths) -> Iterator[str]:
    """English conversations; the speakers take turns."""
    import yaml

    for _, text in texts(paths, lambda name: "/data/english/" in name and name.endswith(".yml")):
        for conversation in yaml.safe_load(text)["conversations"]:
            lines = [_squeeze(str(line)) for line in conversation]
            yield "\n".join(f"{'<' if i % 2 else '>'} {line}" for i, line in enumerate(lines))


def ham(paths: Paths) -> Iterator[str]:
    yield from _mails(paths, r"/data/easy-ham-[12]/[^/]+\.json$")


def spam(paths: Paths) -> Iterator[str]:
    yield from _mails(paths, r"/data/spam-[12]/[^/]+\.json$")


def _mails(paths: Paths, group: str) -> Iterator[str]:
    """Subject and plain text; mails without a plain part, and their headers, are left out."""
    for _, text in texts(paths, lambda name: re.search(group, name) is not None):
        mail = email.message_from_string(json.loads(text)["text"], policy=email.policy.compat32)
        plain = next((part for part in mail.walk() if part.get_content_type() == "text/plain"), None)
        if plain is None:
            continue
        body = _payload(plain).replace("\r\n", "\n").strip()
        # Spam often calls HTML plain.
        if re.search(r"<(html|body|table|font|a href)", body, re.IGNORECASE) or _CRUDE.search(body) or not body:
            continue
        yield f"Subject: {_squeeze(str(mail['Subject'] or ''))}\n\n{body}"


def _payload(part: Any) -> str:
    data = part.get_payload(decode=True)
    try:
        text: str = data.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:  # a charset that does not exist
        text = data.decode("latin-1")
    return text.replace("\x00", "")


def prose(paths: Paths) -> Iterator[str]:
    """Moby-Dick by chapters, and the State of the Union addresses."""
    for name, text in texts(paths, lambda name: re.search(r"/data/[^/]+\.json$", name) is not None):
        entry = json.loads(text)
        if "chapter_" in name:
            yield f"{_squeeze(entry['title'])}\n\n{entry['text'].strip()}"
        elif "year" in entry:
            yield f"{entry['name']}, {entry['year']}\n\n{entry['text'].strip()}"


def wordnet(paths: Paths) -> Iterator[str]:
    """Glosses, each as the definition of its first word."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for name, text in texts(paths, lambda name: "/dict/data." in name):
        kind = kinds[name.rsplit(".", 1)[-1]]
        for line in text.splitlines():
            if line.startswith(" "):  # the licence, in front
                continue
            head, _, gloss = line.partition(" | ")
            word = re.sub(r"\((a|p|ip)\)$", "", head.split(" ")[4]).replace("_", " ")
            yield f"> define {word}\n< {word} ({kind}): {_squeeze(gloss)}"


def markdown_docs(paths: Paths) -> Iterator[str]:
    """Markdown pages without front matter, comments and anchors."""
    for _, text in texts(paths, lambda name: "/docs/" in name and name.endswith(".md")):
        text = re.sub(r"\A---\n(.*?)\n---\n", _title, text, flags=re.DOTALL)
        yield _markdown(text)


def _title(front: re.Match[str]) -> str:
    title = re.search(r"^title: (.+)$", front[1], re.MULTILINE)
    return f"# {title[1]}\n" if title else ""


def _markdown(text: str) -> str:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r"</?(?:a|br|details|div|h\d|img|kbd|li|ol|p|span|sub|summary|sup|table|td|th|tr|ul)\b[^>\n]*>", "", text
    )
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line.rstrip() for line in html.unescape(text).replace("\u200b", "").splitlines()).strip()


def docstrings(paths: Paths) -> Iterator[str]:
    """Docstrings of modules, classes and functions, behind their names."""
    for name, text in texts(paths, lambda name: name.endswith(".py") and "/tests/" not in name):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc:
                    what = name if isinstance(node, ast.Module) else _signature(node)
                    yield f'{what}\n"""{doc}"""'


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def changelogs(paths: Paths) -> Iterator[str]:
    """Lists of changes, one version a document."""
    for _, text in texts(paths, lambda name: re.search(r"^package/(CHANGELOG|HISTORY)\.md$", name) is not None):
        for version in re.split(r"^#{1,2} (?=v?\d)", text, flags=re.MULTILINE)[1:]:
            yield _markdown(version)


def sentences(paths: Paths) -> Iterator[str]:
    for _, text in texts(paths, lambda name: re.search(r"/builds/doc-\d+\.json$", name) is not None):
        for sentence in json.loads(text):
            if not _CRUDE.search(sentence):
                yield _squeeze(sentence)


def essays(paths: Paths) -> Iterator[str]:
    """The sections of An Anarchist FAQ; lines are joined to paragraphs, pages that are only links are left out."""
    for _, text in texts(paths, lambda name: re.search(r"/markdown/(sec|append)[^/]*\.md$", name) is not None):
        for section in re.split(r"^(?=#{1,2} )", text, flags=re.MULTILINE):
            paragraphs = [_squeeze(part) for part in re.split(r"\n\s*\n", _markdown(section))]
            yield "\n\n".join(part.replace("_", "") for part in paragraphs if part)


_FONT = re.compile(r"\\f(\[[A-Z]*\]|.)")
_ESCAPES = {
    r"\-": "-",
    r"\e": "\\",
    r"\(aq": "'",
    r"\(dq": '"',
    r"\&": "",
    r"\ ": " ",
    r"\(em": " - ",
    r"\|": "",
    r"\(bu": "*",
}


def manpages(paths: Paths) -> Iterator[str]:
    """Manual pages as text: macros are resolved to what they print, tables left out."""
    for _, text in texts(paths, lambda name: re.search(r"/man/man\d/[^/]+$", name) is not None):
        if not text.startswith(".so "):  # another name of a page
            yield _roff(text)


def _roff(text: str) -> str:
    text = re.sub(r"^\.TS.*?^\.TE\n", "", text, flags=re.DOTALL | re.MULTILINE)
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(("'\\\"", '.\\"', '\\"')):
            continue
        macro, _, rest = line.partition(" ")
        if macro in (".SH", ".SS"):
            lines += ["", _inline(rest.replace('"', "")).upper(), ""]
        elif macro in (".PP", ".TP", ".IP", ".P", ".LP"):
            lines.append("")
            if macro == ".IP" and rest:
                lines.append(_inline(_arguments(rest)[0]))
        elif re.fullmatch(r"\.(B|I|SM)", macro):
            lines.append(_inline(" ".join(_arguments(rest))))
        elif re.fullmatch(r"\.(BR|RB|IR|RI|BI|IB|SB)", macro):
            lines.append(_inline("".join(_arguments(rest))))
        elif not line.startswith("."):
            lines.append(_inline(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _arguments(rest: str) -> list[str]:
    """A macro's arguments: words, or what stands between quotation marks."""
    found = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest.replace(r"\ ", "\N{NO-BREAK SPACE}"))
    return [(quoted or bare).replace("\N{NO-BREAK SPACE}", r"\ ") for quoted, bare in found] or [""]


def _inline(text: str) -> str:
    text = _FONT.sub("", re.sub(r'\\".*$', "", text))
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character)
    return re.sub(r"\\\((..)|\\\[[^\]]*\]|\\[~0%,/c]", " ", text).rstrip()
