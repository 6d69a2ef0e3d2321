"""Alias of pfgmpp.augment, the name of this module in EDM."""
from pfgmpp.augment import *  # noqa: F403
