"""What every training run needs, pre-training and fine-tuning alike: schedules, checkpoints, log, an orderly stop."""
