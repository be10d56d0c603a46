"""One run under way: its context, its checkpoints and its stages."""
