"""What a model is worth: predictions in blocks, statistics, and analyses of its leaves.

It may import training, data, model and the rooms below them; it knows no method.
"""
