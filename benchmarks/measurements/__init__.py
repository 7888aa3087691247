"""Measurements of speed, memory and quality, one script each."""
