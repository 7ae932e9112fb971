"""The threshold policies, one file each, and the combinators around them.

They import `history`, `policy`, `scale` and `checks`. Read `fixed.py` first, the
smallest policy; `docs/extend.md` shows how to add a policy.
"""
