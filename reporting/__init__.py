"""What runs and networks have to say: logs and weights in, tables and pictures out.

logs.py             read training logs, ours and others'
console_logs.py     epochs from what programs print
comparison.py       runs side by side in tables
following.py        progress of running jobs
plots.py            curves of runs
scatter.py          accuracy against cost
robustness.py       accuracy on other and on corrupted images, side by side
inspection.py       a network opened, its layers named, photographs fed
features.py         branches of a token mixer
receptive_field.py  effective receptive fields
"""
