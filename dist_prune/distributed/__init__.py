"""Where ranks run and how they agree: the launch environment, collectives, the watchdog, preemption."""
