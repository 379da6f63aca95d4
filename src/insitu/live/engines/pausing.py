"""A pause that one thread may begin and another end."""

import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager


class HeldPause:
    """Enters ``context`` in a thread of its own, where it stays until :meth:`release`.

    Transformers' manager counts pauses per thread, and must not be stopped by a thread that it believes to hold one.
    """

    def __init__(self, context: AbstractContextManager[None]) -> None:
        self._context = context
        self._entered: Future[None] = Future()
        self._let_go = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="engine-pause", daemon=True)
        self._thread.start()
        self._entered.result()  # raises what entering raised

    def release(self) -> None:
        self._let_go.set()
        self._thread.join()

    def _hold(self) -> None:
        try:
            self._context.__enter__()
        except BaseException as error:
            self._entered.set_exception(error)
            return
        self._entered.set_result(None)
        self._let_go.wait()
        self._context.__exit__(None, None, None)
