"""Images: data sets on disk, DALI streams, verification."""
