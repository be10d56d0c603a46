"""What a run shows: log, progress, TensorBoard, plots, pages, comparisons."""
