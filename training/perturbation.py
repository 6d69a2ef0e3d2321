"""Alias of pfgmpp.kernel, which used to have this name."""
from pfgmpp.kernel import *  # noqa: F403
