"""Files that are written whole, sealed with a checksum, or kept in the user's cache.

It may import the top modules only, and no torch.
"""
