"""What local training consists of: tasks with their metrics, the loss, how rows are batched, and optimizers.

It may import data, model and the rooms below them.
"""
