"""Reads the rows of a file, one module for each format.

It imports `names.py` and `cells.py` of the folder above. Read `csv_rows.py` first.
"""
