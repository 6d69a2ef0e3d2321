"""Measurements that anyone can run; docs/log.md has results with machine and date."""
