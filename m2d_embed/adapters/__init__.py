"""The models in the shapes that other packages ask for; each module says how to use it there.

* ``m2d_embed.adapters.xares``: an encoder for X-ARES.
* ``m2d_embed.adapters.evar``: an audio representation for EVAR.
* ``m2d_embed.adapters.sklearn``: a transformer for scikit-learn's pipelines.

Nothing is imported here: each module needs what it adapts to.
"""
