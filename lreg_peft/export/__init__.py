"""Adapters for places that do not know LReg."""
