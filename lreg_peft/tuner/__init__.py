"""The PEFT tuner: configuration, model, layers and what a layer notes down; `hooks` is what enters foreign models.

Imports only `core` and the helpers beside this folder. A new weighting, target kind or default placement belongs here.
Its modules are private to the package; what users need is in `lreg_peft` itself.
"""
