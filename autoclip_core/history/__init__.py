"""The past norms of each row: how a policy state stores and evaluates them.

It imports only `scale` and `checks`. Read `window.py` first: it holds the last H norms
in arrival order and in ascending order.
"""
