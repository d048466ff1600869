"""Models built from fastformer.nn, with what it takes to train and sample them.

GPT is importable from here with torch alone. The modules ``tokenizer``, ``data``, ``training`` and ``checkpoint`` need
the packages of ``pip install fastformer[models]``, and say so.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fastformer.models.gpt import GPT, GPTConfig, KVCache

__all__ = ["GPT", "GPTConfig", "KVCache", "require"]


def require(name: str) -> ModuleType:
    """Import an optional dependency, or raise an ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(f"{package} is not installed: pip install fastformer[models]", name=package) from error
