"""`ClipLog`: a bounded record of a run, its summary, its pictures and its files.

It imports `files` and `checks`. Read `clip_log.py` first.
"""
