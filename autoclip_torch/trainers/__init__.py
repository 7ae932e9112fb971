"""What the callbacks of trainers share; no file here imports a trainer.

It imports `hooks` and the folders below. Read `clippers.py` first.
"""
