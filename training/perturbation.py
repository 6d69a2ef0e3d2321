"""Alias of pfgmpp.kernel, whose name this was."""
from pfgmpp.kernel import *  # noqa: F403
