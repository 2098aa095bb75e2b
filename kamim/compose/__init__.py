"""Wires stores, loaders and loops together. The one package besides the CLI that knows every room."""
