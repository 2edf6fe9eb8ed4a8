"""The same methods over Flower: a server and clients of our own on Flower's SuperLink and Fleet API, a plain Flower app, and
a `Strategy` for those who have an app already.

    server.py    `fedlora server`: SuperLink, run and rounds in one process
    client.py    `fedlora client`: a resident SuperNode, which loads its model once
    trial.py     `fedlora federation try`: all of it on this machine
    keys.py      certificates and node keys
    app.py       ServerApp and ClientApp for `flwr run`
    strategy.py  a method as a Flower Strategy
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported; we send nothing anywhere
