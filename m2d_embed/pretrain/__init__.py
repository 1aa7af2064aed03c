"""Pre-training of M2D and its relatives; needs the extra ``pretrain``. ``m2d-embed pretrain RECIPE`` runs it.

Data flows one way: ``sources -> crops -> mel_cache -> datasets``, ``masking``, ``predictor -> objectives -> loop``,
and everything is described by a ``recipe``.
"""
