"""What pre-training and fine-tuning share: the loop (``trainer``), settings, schedules, checkpoints, log, stopping."""
