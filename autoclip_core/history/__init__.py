"""What a policy keeps of past norms, and how it is read.

It imports `scale` and `checks` alone. Read `window.py` first: the last H norms, in
arrival order and sorted.
"""
