"""Reads norms from files that other programs wrote.

It imports no other module of this package. Read `read.py` first.
"""
