"""Without an optimiser: cached features, certified fits of coefficients and meshes, linearised refinement.

All of it starts from `output_shortcut`, a shortcut that gives the model's output. Uses the tuner and `core`.
"""
