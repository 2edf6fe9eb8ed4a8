"""The project as a Flower app: everything is in the package and in the recipe."""

from fedlora.flower.app import client_app, server_app

__all__ = ["client_app", "server_app"]
