"""When a session has to end: plain arithmetic, by which a long run stops itself before its platform does."""

import time
from dataclasses import dataclass

import psutil

from utils.hardware import where
from utils.processes import find_driver

RESERVE_S = 600.0  # for the last checkpoint, the report, and the platform's own saving


def session_started() -> float:
    """When this session began, in seconds since 1970.

    On Kaggle and Colab with the machine's first process, since their limits count from there; elsewhere with the
    driver, or with this process where a notebook was opened by hand.
    """
    own = psutil.Process()
    first = find_driver() if where() == "local" else (own.parents() or [own])[-1]
    return min(own.create_time(), first.create_time()) if first else own.create_time()


@dataclass(frozen=True)
class Deadline:
    """The moment at which a run ends itself; `max_hours` None is never."""

    started: float
    max_hours: float | None = None
    reserve_s: float = RESERVE_S

    @classmethod
    def of(cls, max_hours: float | None) -> "Deadline":
        """This session's; of a very short session a tenth is kept in reserve, so that trials can be short."""
        return cls(session_started(), max_hours, min(RESERVE_S, 360.0 * (max_hours or 24)))

    def is_due(self, now: float | None = None, next_s: float = 0.0) -> bool:
        """Whether to stop now, because another `next_s` seconds of work and the reserve would not fit; never without a limit."""
        if self.max_hours is None:
            return False
        return (time.time() if now is None else now) + next_s + self.reserve_s >= self.started + 3600 * self.max_hours

    def sentence(self, now: float | None = None) -> str:
        spent = ((time.time() if now is None else now) - self.started) / 3600
        return f"this session is {spent:.1f} h old and hardware.max_hours is {self.max_hours:g}"
