"""andrea16: what ``get`` promises, on two small packages in the place of the real ones; and each source's cleaning."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from insitu.data import andrea16
from insitu.data import andrea16_texts as of
from insitu.data.andrea16_sources import Source
from insitu.data.config import SourceConfig
from insitu.data.messages import DataError
from insitu.data.packages import Archive, texts
from insitu.data.text import documents

SHARED = "a paragraph of seven words in all"


def _zip(path: Path, files: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def _read(paths: Sequence[Path]) -> Iterator[str]:
    for _, text in texts(paths, lambda name: True):
        yield from text.split("===")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the packages of three sources, the first two sharing text, lie already."""
    contents = {
        "first": {
            "a": f"only here, with enough words in it===first heading\n\n{SHARED}\n\nand of its own some more words"
        },
        "second": {"a": f"second heading\n\n{SHARED}\n\nanother paragraph with enough words==={SHARED}===too short"},
        "third": {"a": "five words are just enough===five  words are\njust enough"},
    }
    sources = []
    for name, files in contents.items():
        archive = Archive("pip", name, "1.0", "", "MIT")
        path = _zip(tmp_path / "packages" / archive.file_name, files)
        pinned = dataclasses.replace(archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        sources.append(Source(name, f"role of {name}", (pinned,), _read))
    monkeypatch.setattr(andrea16, "SOURCES", tuple(sources))
    monkeypatch.setattr(andrea16, "NAMES", tuple(contents))
    monkeypatch.setenv("PATH", "")  # no tool can be run
    return tmp_path


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def _manifest(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())["sources"]
    return manifest


def test_equal_paragraphs_are_kept_once_over_all_sources(out: Path) -> None:
    andrea16.get(out)
    assert _texts(out / "first.jsonl") == [
        "only here, with enough words in it",
        f"first heading\n\n{SHARED}\n\nand of its own some more words",
    ]
    assert _texts(out / "second.jsonl") == ["second heading\n\nanother paragraph with enough words"]
    assert _texts(out / "third.jsonl") == ["five words are just enough"]


def test_the_manifest_says_what_was_made_of_what(out: Path) -> None:
    andrea16.get(out)
    manifest = _manifest(out)
    assert list(manifest) == ["first", "second", "third"]
    for name, entry in manifest.items():
        content = (out / f"{name}.jsonl").read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["documents"] == len(content.splitlines())
        assert entry["bytes"] == sum(len(text.encode()) for text in _texts(out / f"{name}.jsonl"))
        assert (entry["role"], entry["licence"]) == (f"role of {name}", "MIT")
        (archive,) = entry["made_of"]["archives"]
        package = out / "packages" / f"pip-{name}-1.0.zip"
        assert archive["sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()


def _stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}


def test_what_is_there_and_right_stays(out: Path) -> None:
    andrea16.get(out)
    before = _stamps(out)
    lines: list[str] = []
    andrea16.get(out, report=lines.append)
    assert _stamps(out) == before
    assert [line.split(",")[0] for line in lines] == [f"{name}: there already" for name in before] or len(lines) == 3
    assert all("there already" in line for line in lines)


def test_a_changed_file_is_made_again(out: Path) -> None:
    andrea16.get(out)
    right = (out / "second.jsonl").read_bytes()
    (out / "second.jsonl").write_bytes(right + b'{"text": "slipped in"}\n')
    andrea16.get(out, ["third"])
    assert (out / "second.jsonl").read_bytes() == right


@pytest.mark.parametrize(
    "parts", [["third", "second", "first"], ["second", "first", "third"], ["first", "third", "second"]]
)
def test_in_parts_it_becomes_the_same_as_at_once(out: Path, parts: list[str]) -> None:
    for name in parts:
        andrea16.get(out, [name])
    in_parts = {path.name: path.read_bytes() for path in out.glob("*.jsonl")} | {
        "manifest": (out / "manifest.json").read_bytes()
    }
    for path in [*out.glob("*.jsonl"), out / "manifest.json"]:
        path.unlink()
    andrea16.get(out)
    at_once = {path.name: path.read_bytes() for path in out.glob("*.jsonl")} | {
        "manifest": (out / "manifest.json").read_bytes()
    }
    assert in_parts == at_once


def test_a_part_is_only_that_part(out: Path) -> None:
    andrea16.get(out, ["second"])
    assert [path.name for path in out.glob("*.jsonl")] == ["second.jsonl"]
    assert SHARED in "".join(_texts(out / "second.jsonl"))
    with pytest.raises(DataError, match="no source 'fourth'; expected first, second, third"):
        andrea16.get(out, ["fourth"])


def test_a_missing_tool_is_said_with_the_sources_that_need_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = andrea16.SOURCES
    third = dataclasses.replace(third, archives=(dataclasses.replace(third.archives[0], tool="npm"),))
    monkeypatch.setattr(andrea16, "SOURCES", (first, second, third))
    monkeypatch.setattr(andrea16, "missing_programs", lambda tool: ["npm"] if tool == "npm" else [])
    (out / "packages" / "pip-first-1.0.zip").unlink()
    with pytest.raises(
        DataError, match=r"npm not found, needed for third; install it, or take a part: --sources first$"
    ):
        andrea16.get(out)
    assert list(out.glob("*.jsonl")) == [], "nothing was begun"
    andrea16.get(out, ["second"])


def test_another_manifest_is_not_overwritten(out: Path) -> None:
    (out / "manifest.json").write_text('{"version": 3}')
    with pytest.raises(DataError, match="is not the manifest of andrea16"):
        andrea16.get(out)
    assert (out / "manifest.json").read_text() == '{"version": 3}'


def test_text_of_a_packaged_source_is_read_back(out: Path) -> None:
    andrea16.get(out)
    source = SourceConfig(name="third", package="andrea16")
    assert list(documents(source, str(out))) == ["five words are just enough"]


_KILLED = """
import sys, os, signal, zipfile, dataclasses, hashlib
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_andrea16 as t
from insitu.data import andrea16
from insitu.data.andrea16_sources import Source
from insitu.data.packages import Archive
out, kill_at = Path(sys.argv[1]), int(sys.argv[3])
def archive(name):
    packed = (out / "packages" / f"pip-{name}-1.0.zip").read_bytes()
    return Archive("pip", name, "1.0", hashlib.sha256(packed).hexdigest(), "MIT")
andrea16.SOURCES = tuple(Source(n, n, (archive(n),), t._read) for n in ("first", "second", "third"))
andrea16.NAMES = ("first", "second", "third")
count, real = 0, os.fsync
def fsync(descriptor):
    global count
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    real(descriptor)
os.fsync = fsync
andrea16.get(out)
print(count)
"""


def test_killed_at_any_write_it_goes_on_to_the_same_result(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _KILLED, str(out), str(Path(__file__).parent), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = run(10**6)
    assert whole.returncode == 0, whole.stderr
    wanted = {path.name: path.read_bytes() for path in [*out.glob("*.jsonl"), out / "manifest.json"]}
    num_syncs = int(whole.stdout)
    assert num_syncs > 6
    for kill_at in range(0, num_syncs, 2):
        for name in wanted:
            (out / name).unlink()
        assert run(kill_at).returncode == -signal.SIGKILL
        assert run(10**6).returncode == 0
        assert {path.name: path.read_bytes() for path in [*out.glob("*.jsonl"), out / "manifest.json"]} == wanted


# Cleaning: what each source makes of its package's form


@pytest.mark.parametrize(
    ("read", "files", "expected"),
    [
        (
            of.wiki,
            {
                "p/data/summaries_en-us.json": json.dumps({"Hat": {"title": "Hat", "extract": "A hat is\nworn."}}),
                "p/x.json": "{}",
            },
            ["> What is Hat?\n< A hat is worn."],
        ),
        (
            of.fortunes,
            {
                "./usr/share/games/fortunes/wisdom": "First one.\n%\nSecond\n\t-- somebody\n%\n",
                "./usr/share/games/fortunes/wisdom.dat": "x",
                "./usr/share/games/fortunes/ethnic": "no",
            },
            ["First one.", "Second\n    -- somebody"],
        ),
        (
            of.scenes,
            {
                "i/plays/t/a.md": "# A Play\n\n## ACT I\n\n### SCENE I. A room\n\n_Enter X_\n\n**X**  \nGood day,  \nsir.\n"
            },
            ["A Play. SCENE I. A room\n\n[Enter X]\n\nX: Good day,\nsir."],
        ),
        (
            of.chatterbot,
            {"c/data/english/a.yml": "conversations:\n- - Hello\n  - Hi  there\n  - Bye\n", "c/data/dutch/a.yml": "x"},
            ["> Hello\n< Hi there\n> Bye"],
        ),
        (
            of.ham,
            {
                "package/data/easy-ham-1/1.json": json.dumps(
                    {"text": "Subject: Re: a\n b\nFrom: x\n\nBody\r\nof it\n"}
                ),
                "package/data/easy-ham-1/1.txt": "x",
                "package/data/spam-1/2.json": json.dumps({"text": "Subject: buy\n\nnow"}),
                "package/data/easy-ham-2/3.json": json.dumps({"text": "Content-Type: text/html\n\n<html>"}),
            },
            ["Subject: Re: a b\n\nBody\nof it"],
        ),
        (of.spam, {"package/data/spam-2/2.json": json.dumps({"text": "Subject: buy\n\nnow"})}, ["Subject: buy\n\nnow"]),
        (
            of.prose,
            {
                "package/data/chapter_1.json": json.dumps({"chapter": "1", "title": "Loomings.", "text": "Call me."}),
                "package/data/1790_x.json": json.dumps({"year": 1790, "name": "X", "text": "Fellow-Citizens"}),
                "package/data/list.json": "[]",
            },
            ["X, 1790\n\nFellow-Citizens", "Loomings.\n\nCall me."],
        ),
        (
            of.wordnet,
            {
                "package/dict/data.adj": '  1 licence\n00 00 a 02 close(p) 0 near 0 001 & 1 a 0 | not far; "a close call"  \n',
                "package/dict/index.adj": "x",
            },
            ['> define close\n< close (adjective): not far; "a close call"'],
        ),
        (
            of.markdown_docs,
            {
                "p/docs/a.md": '---\ntitle: npm-audit\n---\n\n<!-- x -->Use [this](u) `npm <package>`<a id="x"></a>\n',
                "p/README.md": "no",
            },
            ["# npm-audit\n\nUse this `npm <package>`"],
        ),
        (
            of.docstrings,
            {
                "s/a.py": '"""Module."""\ndef f(x, y=1):\n    """Adds."""\nclass C:\n    pass\n',
                "s/tests/b.py": '"""No."""',
            },
            ['s/a.py\n"""Module."""', 'def f(x, y=1):\n"""Adds."""'],
        ),
        (
            of.changelogs,
            {
                "package/CHANGELOG.md": "# Log\n\n## 2.0.1\n\n- &#8203;<!-- 1 -->Fix @x\n\n## v1.0\n\n- First\n",
                "package/b/CHANGELOG.md": "no",
            },
            ["2.0.1\n\n- Fix @x", "v1.0\n\n- First"],
        ),
        (
            of.sentences,
            {"package/builds/doc-1.json": '["One  here.", "A shit one."]', "package/x.json": "[]"},
            ["One here."],
        ),
        (
            of.essays,
            {
                "./d/markdown/secA1.md": "# A.1 What\n\nLine one\nof _text_.\n\n## A.1.1 Next\n\nMore.\n",
                "./d/markdown/links.md": "no",
            },
            ["", "# A.1 What\n\nLine one of text.", "## A.1.1 Next\n\nMore."],
        ),
        (
            of.manpages,
            {
                "./usr/share/man/man3/abs.3": (
                    '\'\\" t\n.\\" Copyright\n.TH abs 3\n.SH NAME\nabs, labs \\- absolute \\fIvalue\\fP\n.SH SYNOPSIS\n'
                    '.BI "int abs(int " j );\n.TS\ntable\n.TE\nSee\n.BR attributes (7).\n'
                ),
                "./usr/share/man/man3/labs.3": ".so man3/abs.3\n",
            },
            ["NAME\n\nabs, labs - absolute value\n\nSYNOPSIS\n\nint abs(int j);\nSee\nattributes(7)."],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_source_is_cleaned_to_documents(
    tmp_path: Path, read: Any, files: dict[str, str], expected: list[str]
) -> None:
    assert list(read([_zip(tmp_path / "a.zip", files)])) == expected


def test_question_and_reply_are_in_one_of_the_two_chats_only(tmp_path: Path) -> None:
    rules = "".join(
        f"<category><pattern>WHAT IS NUMBER I {'X' * (i % 40)}{i}</pattern>\n"
        f"<template>It is\n {i} &amp; more.</template></category>"
        for i in range(900)
    )
    rules += "<category><pattern>WHAT *</pattern><template>x</template></category>"
    rules += "<category><pattern>HELLO</pattern><template><srai>HI</srai></template></category>"
    path = _zip(
        tmp_path / "a.zip", {"p/botdata/alice/a.aiml": rules, "p/botdata/alice/sex.aiml": rules.replace("NUMBER", "NO")}
    )
    pairs, dialogues = list(of.aiml_pairs([path])), list(of.aiml_dialogues([path]))
    assert pairs[0].startswith("> What is number I ")
    assert pairs[0].endswith("& more.")
    in_dialogues = {
        f"{q}\n{r}" for d in dialogues for q, r in zip(d.split("\n")[::2], d.split("\n")[1::2], strict=True)
    }
    assert in_dialogues.isdisjoint(pairs)
    assert all(len(dialogue.split("\n")) == 8 for dialogue in dialogues)
    assert 896 <= len(pairs) + len(in_dialogues) <= 900, "at most an unfinished dialogue is lost"
    assert 40 < len(in_dialogues) < 160


def test_the_real_table_is_sixteen_pinned_sources() -> None:
    assert len(andrea16.SOURCES) == len(set(andrea16.NAMES)) == 16
    for source in andrea16.SOURCES:
        assert source.archives
        for archive in source.archives:
            assert archive.tool in ("pip", "npm", "apt")
            assert len(bytes.fromhex(archive.sha256)) == 32
            assert archive.version
            assert archive.licence
    names = {archive.file_name: archive for source in andrea16.SOURCES for archive in source.archives}
    assert len(set(names.values())) == len(names), "no two packages share a file"
