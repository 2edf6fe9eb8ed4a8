"""Rounds of a federation on one machine: its setting, the engine, messages, the run folder and the summary.

It may import methods and the rooms below them; it knows neither recipes nor a network.
"""
