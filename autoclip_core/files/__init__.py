"""Reads norms from files that other programs wrote.

It imports nothing of this package. Read `read.py` first.
"""
