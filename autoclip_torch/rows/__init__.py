"""What is clipped: the parameters in groups, cut into rows.

A row is the gradient values that share one norm. This folder imports only
`autoclip_core`. Read `rows.py` first. `groups.py` reads a clipper's first argument.
"""
