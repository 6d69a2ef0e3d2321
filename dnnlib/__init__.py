"""Helpers that need no PyTorch: attribute dictionaries, downloads, logging, formatting."""

from dnnlib import util
from dnnlib.util import EasyDict

__all__ = ["EasyDict", "util"]
