"""A signal that comes before there is a run to stop."""

import os
import signal

from dlm.core import signals


def test_a_signal_before_the_run_is_remembered_for_it():
    from dlm.train.callbacks.preemption import SIGNALS, Preemption

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signals.remember()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        owner = Preemption()
        owner.take_signals()
        assert signals.asked_to_stop() and owner._flag
    finally:
        signals.forget()
        for number, handler in handlers.items():
            signal.signal(number, handler)
