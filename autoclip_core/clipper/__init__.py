"""What is the same for a clipper in every framework: settings, units, metrics.

It imports the policies and the folders below them; the adapters import its modules.
Read `settings.py` first.
"""
