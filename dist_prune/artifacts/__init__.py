"""What a run leaves on disk: its directory, checkpoints, saved models, metrics, and readers of these."""
