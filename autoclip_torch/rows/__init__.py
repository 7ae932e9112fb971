"""What is clipped: parameters in groups, cut into rows.

A row is the gradient values that share one norm. This folder imports `autoclip_core`
alone. Read `rows.py` first; `groups.py` reads the first argument of a clipper.
"""
