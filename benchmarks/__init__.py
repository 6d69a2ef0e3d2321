"""Measurements that anyone can run; results with machine and date stand in docs/log.md."""
