"""The models of a finished run: export them, predict with them.

It may import recipe and the rooms below it.
"""
