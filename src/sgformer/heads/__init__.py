"""Heads on a feature pyramid. They see channels and strides, never the network that made the maps."""
