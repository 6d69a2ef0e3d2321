"""Alias of images.dataset, the name of this module in EDM."""
from images.dataset import *  # noqa: F403
