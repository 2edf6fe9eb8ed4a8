"""Deployment without a network: what a site does with an order, and how a server drives sites through a Link.

The engine, methods and store are those of a simulation; `fedlora.flower` carries the packets.
"""
