"""Quality of images: feature extractors, distances between sets, and the protocol they are reported with."""
