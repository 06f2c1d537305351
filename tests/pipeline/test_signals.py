"""A wish to stop is remembered, handed on once, and obeyed at once when it is repeated later."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from utils.pipeline.signals import StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_what_is_at_work_goes_on_and_knows_that_it_was_asked(number, name):
    forwarded = []
    before = signal.getsignal(number)
    with StopRequest(lambda: forwarded.append(1)) as stop:
        assert not stop.asked
        send(number)
        assert stop.asked and stop.name == name and stop.number == number
        send(number)  # the same wish by another way
    assert forwarded == [1] and signal.getsignal(number) is before


def test_asked_again_later_it_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt), StopRequest(patience_s=0.0) as stop:
        send(signal.SIGTERM)
        assert stop.asked
        send(signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    """Under nohup, and in a shell's background job, Ctrl-C is not meant for us."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGINT)
        assert not stop.asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def enter():
        before = signal.getsignal(signal.SIGTERM)
        with StopRequest() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) is before and not stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [True]
