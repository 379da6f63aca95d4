"""What a learner left behind when its process ended."""

import logging
from collections.abc import Callable

from insitu.live.engines.base import Engine
from insitu.live.weights.header import Header

log = logging.getLogger("insitu.server")


def repair(engine: Engine, header: Header, head: int, restore: Callable[[], None], paused: bool) -> None:
    """Undo what was not committed, and let requests go on.

    Args:
        engine: whose requests wait, if the learner had paused it.
        header: what the arena says.
        head: the last committed version.
        restore: makes the arena that version again.
        paused: the learner had paused the engine.

    Raises whatever stands in the way; the engine is then still paused, because nothing is known of its weights.
    """
    if header.writer or header.step or header.version != head:
        log.warning("the learner died in %s; restoring version %d", header.label, head)
        if not paused:
            engine.pause()
            paused = True
        restore()
    if paused:
        # Also where nothing was to be undone: it may have died between its commit and the publish, and caches and label
        # would be those of the version before.
        engine.publish(str(head))
        engine.resume()
