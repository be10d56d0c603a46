"""Work that takes a known time of the processor, however busy the machine is."""

import time


def spin(seconds: float) -> None:
    """Compute for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
