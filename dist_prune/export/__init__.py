"""Exporting a compressed network: formats, source code, speed."""
