"""Data on disk: images in files, arrays and archives; conversion; and the training data set."""
