"""What networks cost: networks in, times and counts out.

timing.py      interleaved rounds and their spread
forms.py       forms in which a network is timed
operations.py  parameters and multiply-accumulates
steps.py       training steps on made-up images
throughput.py  images per second at the batch size that fits
"""
