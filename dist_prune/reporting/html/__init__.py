"""report.html and report.md of a run."""
