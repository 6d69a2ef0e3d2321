"""Alias of pfgmpp.loss, the name of this module in EDM."""
from pfgmpp.loss import *  # noqa: F403
