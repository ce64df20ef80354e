"""What runs have to say: logs in, tables and pictures out.

logs.py   read training logs, ours and others'
plots.py  curves, and accuracy against cost
"""
