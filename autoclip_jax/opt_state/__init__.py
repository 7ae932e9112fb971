"""What a whole optimizer state holds: its clippers, their places, and its faults.

The folder may import `gradients`, `state` and `skip_state`. Read `find_states.py`
first.
"""
