"""The clients' data: sources, tokens, partitions and batches.

It may import model and the rooms below it.
"""
