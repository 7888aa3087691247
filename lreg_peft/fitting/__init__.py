"""Without an optimiser: cached features, certified fits of coefficients and meshes, linearised refinement.

All of it starts from `output_layer`, the shortcut that gives the model's output. Uses the tuner and `core`.
"""
