"""The threshold policies, a file each.

They import `history`, `policy`, `scale` and `checks`. Read `fixed.py` first: it is the
smallest; `docs/extend.md` shows how to add one.
"""
