"""Gradient training: starts from data, gathering statistics, moving meshes, the callback that does it in a Trainer.

Uses the tuner and `core`; knows nothing of `fitting`.
"""
