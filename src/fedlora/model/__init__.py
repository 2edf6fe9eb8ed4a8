"""The frozen base model with deltas on its layers: groups of layers, and dropout.

It may import adapters, kernels and the top modules.
"""
