"""Checkpoints: our own files, and the published ones of EDM and PFGM++."""
