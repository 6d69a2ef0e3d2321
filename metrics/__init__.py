"""Scores of generated images: feature extractors, statistics of features, distances."""
