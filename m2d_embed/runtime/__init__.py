"""Many clips at once: read ahead, cut into windows, batched, collected."""
