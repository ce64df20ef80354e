"""What runs and networks have to say: logs and weights in, tables and pictures out.

logs.py             read training logs, ours and others'
console_logs.py     epochs from what programs print
comparison.py       runs side by side in tables
following.py        progress of running jobs
plots.py            curves of runs
scatter.py          accuracy against cost
robustness.py       accuracy on other and on corrupted images, side by side
pages.py            self-contained HTML pages: elements that escape, tables, pictures
charts.py           curves, bars and reliability diagrams on them, as inline SVG
outcomes.py         what a network said of each image, and what follows from it
evaluation_page.py  the page of an evaluation
batch_page.py       images of a training step, as a page or a PNG
run_page.py         the page of a set of runs
browser.py          pages as a browser shows them
inspection.py       a network opened, its layers named, photographs fed
features.py         branches of a token mixer
receptive_field.py  effective receptive fields
"""
