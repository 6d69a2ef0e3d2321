"""Data on disk: files, arrays and archives as images, conversion, and the training data set."""
