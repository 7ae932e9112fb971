"""Choosing a threshold from recorded norms: replay a policy, suggest a constant.

It imports `log`, the policies and what lies below them. Read `replay.py` first.
"""
