"""Alias of pfgmpp.samplers, which used to have this name."""
from pfgmpp.samplers import *  # noqa: F403
