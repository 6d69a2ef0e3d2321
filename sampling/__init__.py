"""Sampling from trained networks, and what is written: images in folders, ZIPs or memory."""
