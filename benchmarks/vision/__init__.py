"""Ways to adapt image classifiers."""
