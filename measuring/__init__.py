"""What networks cost: networks in, times and counts out.

timing.py  interleaved rounds and their spread
"""
