"""The command line `autoclip`.

It may import everything in this package. Read `main.py` first.
"""
