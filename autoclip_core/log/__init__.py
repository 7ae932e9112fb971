"""`ClipLog`: what a clipper did in a run, as a summary, pictures, files and a page.

It imports `record`, `series`, `plots`, `files` and `checks`. Read `clip_log.py` first.
"""
