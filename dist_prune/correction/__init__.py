"""Closed-form correction of a compressed network against the dense one."""
