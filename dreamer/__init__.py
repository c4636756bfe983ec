"""Patch tokens against channel tokens in a world model for echocardiography probe guidance."""

import importlib

_PUBLIC = {"ModelConfig": "model", "CardiacDreamer": "model", "load_run": "runs"}
__all__ = ["CardiacDreamer", "ModelConfig", "load_run"]


def __getattr__(name: str):
    # Imported on first use: poses and the phantom should not wait for the training's libraries.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dreamer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dreamer.{_PUBLIC[name]}"), name)
