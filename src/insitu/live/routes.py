"""Whose bytes a version has, and the shortest way to them from a version that is there in full.

Contents (the base, and every lesson) are the nodes of a graph, the files of differences its edges. An edge leads from a
lesson's parent to the lesson, and can be walked both ways; a pruned lesson has lost its edge, and can still be walked over.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from insitu.live.checkpoint import VersionError
from insitu.live.records import Version

# How a content is come by: from another one, over the file of a lesson, backwards or not; None where one starts.
Ways = dict[int, tuple[int, int, bool] | None]


@dataclass(frozen=True, slots=True)
class Route:
    """How to come by a version: start from one that is there in full, apply differences (version, backwards) to it."""

    start: int
    steps: tuple[tuple[int, bool], ...] = ()


class History:
    """The committed versions of a store at one moment."""

    def __init__(self, versions: Iterable[Version]) -> None:
        self.known = {v.id: v for v in versions if v.status == "committed"}
        self._contents: dict[int, int] = {}
        for id, version in sorted(self.known.items()):  # a target is older than the rollback to it
            self._contents[id] = id if version.target is None else self._contents[version.target]

    def left(self) -> list[int]:
        """The versions whose bytes were not given up."""
        return [id for id, content in self._contents.items() if not self.known[content].pruned]

    def content(self, version: int) -> int:
        """The version whose bytes these are: itself, or what a rollback repeats in the end. Raises VersionError."""
        content = self._contents.get(version)
        if content is None:
            raise VersionError(f"version {version} does not exist; committed versions that are left: {self.left()}")
        if self.known[content].pruned:
            raise VersionError(
                f"version {version} was pruned to save room, its bytes are gone; versions that are left: {self.left()}"
            )
        return content

    def repeating(self, contents: set[int]) -> set[int]:
        """All versions with these bytes: the rollbacks to them are among them."""
        return {id for id, content in self._contents.items() if content in contents}

    def ways(self, starts: Iterable[int]) -> Ways:
        """To everything that can be reached, the shortest; of two, that from the start which is named first."""
        edges: dict[int, list[tuple[int, int, bool]]] = {}
        for v in self.known.values():
            if v.kind == "teach" and not v.pruned and v.parent is not None:
                parent = self._contents[v.parent]
                edges.setdefault(parent, []).append((v.id, v.id, False))
                edges.setdefault(v.id, []).append((parent, v.id, True))
        found: Ways = dict.fromkeys(starts)
        queue = deque(found)
        while queue:
            at = queue.popleft()
            for other, file, backwards in edges.get(at, []):
                if other not in found:
                    found[other] = (at, file, backwards)
                    queue.append(other)
        return found

    def route(self, version: int, ways: Ways) -> Route:
        """Raises VersionError when there is no way to this version, saying why."""
        at = self.content(version)
        if at not in ways:
            raise VersionError(f"nothing is left from which version {version} could be rebuilt")
        steps = []
        while (way := ways[at]) is not None:
            at, file, backwards = way
            steps.append((file, backwards))
        return Route(at, tuple(reversed(steps)))
