"""Alias of pfgmpp.samplers, whose name this was."""
from pfgmpp.samplers import *  # noqa: F403
