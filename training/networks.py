"""Alias of pfgmpp.networks, the name of this module in EDM."""
from pfgmpp.networks import *  # noqa: F403
