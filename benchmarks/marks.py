"""What is made from results, put between two marks in a text that people write."""

import sys
from pathlib import Path


def between(text: str, marks: tuple[str, str], made: str, where: Path) -> str:
    """``text`` with ``made`` between the marks. Ends the program, naming the file, unless each mark is there once, in order."""
    first, last = marks
    before, found, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended) or text.count(first) != 1 or text.count(last) != 1:
        sys.exit(f"{where} has not exactly one {first} and, behind it, one {last}: put them where it is to be")
    return f"{before}{first}\n\n{made}\n\n{last}{after}"


def commit(recorded: str) -> str:
    """A commit as tables show it: short, and with the mark of a tree that had changes."""
    name, _, changes = recorded.partition(" ")
    return f"{name[:10]} {changes}".strip()
