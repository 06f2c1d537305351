"""Ctrl-C and SIGTERM as a wish rather than an exception: what is at work comes to a good end first."""

import signal
import threading
import time
from collections.abc import Callable


class StopRequest:
    """While entered, SIGINT and SIGTERM set `asked` and call `forward`; a second one raises KeyboardInterrupt.

    The same wish can arrive twice, through the terminal and through a parent: the second one counts after `patience_s`.
    Only the main thread can listen; elsewhere, and for a signal that is ignored (nohup), nothing changes.
    """

    def __init__(self, forward: Callable[[], None] = lambda: None, patience_s: float = 3.0):
        self.number, self._forward, self._patience_s = 0, forward, patience_s

    @property
    def asked(self) -> bool:
        return bool(self.number)

    @property
    def name(self) -> str:
        """What asked, in words."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name

    def __enter__(self) -> "StopRequest":
        main = threading.current_thread() is threading.main_thread()
        heard = [s for s in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame) -> None:
        if not self.asked:
            self.number, self._since = number, time.monotonic()
            self._forward()
        elif time.monotonic() - self._since >= self._patience_s:
            raise KeyboardInterrupt
