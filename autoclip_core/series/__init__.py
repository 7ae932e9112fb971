"""What a series of norms shows: spikes, lasting changes of level, and a diagnosis.

It imports only `record` and what lies below it. Read `diagnosis.py` first.
"""
