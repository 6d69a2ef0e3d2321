"""Helpers for a distributed PyTorch program: processes, statistics, files."""
