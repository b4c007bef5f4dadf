"""Runs in a folder: found, listed, compared; without importing torch."""
