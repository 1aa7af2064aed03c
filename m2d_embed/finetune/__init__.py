"""Fine-tuning of a pretrained encoder on labelled clips or events. ``m2d-embed finetune DATA`` runs it.

What is trained on: ``crops`` (random crops, whole clips, targets), changed by ``augment``. ``frame_scores`` judges the
detection of events. What is learned from which clips: ``recipe`` and ``task``. What is trained and how: ``network`` and
``optim``, as the task in ``loop``, which ``evaluate`` and ``export`` end. ``example`` is a loop to copy.
"""
