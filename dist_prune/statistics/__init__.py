"""Sums over all images and ranks: second moments, curvature, and which of these a method needs."""
