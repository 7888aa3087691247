"""Everything that hooks into a foreign model, with one protocol for putting it in and taking it out again.

Nothing here computes a shortcut: that is the layer's. Private to the tuner.
"""
