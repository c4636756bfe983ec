"""Patch tokens against channel tokens in a world model for probe guidance."""
