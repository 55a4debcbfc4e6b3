"""Heads on a feature pyramid. They depend on its channels and strides only, not on the network below."""
