"""Sound files and arrays: found, opened, decoded, resampled to what a model takes."""
