"""What is clipped: parameters in groups, and the rows of their gradients.

This folder imports `autoclip_core` alone. Read `rows.py` first: it says which gradient
values share a norm; `read.py` reads the first argument of a clipper, and
`predecessors.py` says which parameters continue others.
"""
