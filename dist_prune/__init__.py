"""Compress pre-trained networks by rank-reducing their convolutions and linear layers, on any number of ranks."""

from dist_prune.export import load_compressed

__all__ = ["load_compressed"]
