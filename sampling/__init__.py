"""From a trained network and seeds to images, in folders or in memory."""
