"""What a clipper is in every framework: settings, units, metrics, state files.

It imports the policies and what lies below them. Read `settings.py` first; the adapters
import these modules.
"""
