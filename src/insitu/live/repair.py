"""What a learner left behind when its process ended."""

import logging
from collections.abc import Mapping

from insitu.live.engines.base import Engine
from insitu.live.versions import Versions
from insitu.live.weights.arena import Arena

log = logging.getLogger("insitu.server")


def repair(engine: Engine, arena: Arena, versions: Versions, aliases: Mapping[str, str], paused: bool) -> None:
    """Undo what was not committed, and let requests go on. ``paused`` says that the learner had paused the engine.

    Raises whatever stands in the way; the engine is then still paused, because nothing is known of its weights.
    """
    header = arena.header
    head = versions.store.head()
    assert head is not None
    if header.writer or header.step or header.version != head:
        log.warning("the learner died in %s; restoring version %d", header.label, head)
        if not paused:
            engine.pause()
            paused = True
        versions.restore(head, arena, aliases)
        engine.publish(arena.header.label)
    if paused:
        engine.resume()
