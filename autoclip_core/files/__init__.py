"""Reads norms from files that other programs wrote, and replaces a file as a whole.

It imports no other module of this package; `formats` has a file for each format. Read
`read.py` first.
"""
