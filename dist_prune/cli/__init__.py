"""The commands of `dist-prune`."""
