"""Pre-training of M2D and its relatives; needs the extra ``pretrain``. ``m2d-embed pretrain RECIPE`` runs it.

Data flows one way. What is read: ``sources -> crops, mel_cache -> batches -> datasets, shards -> data``, with a mask
of ``masking`` for each clip. What is trained: ``predictor -> objectives``, fed by ``inputs``, put together by
``build``, begun from ``warm_start``. ``loop`` takes the steps, with ``schedule``, ``monitor``, ``run_state`` and
``export``. A ``recipe`` describes it all.
"""
