"""File formats: each module turns files into named `StoredArray`s with their metadata."""
