"""From a file to a batch: paths and keys in, augmented pixels out.

keys.py     the keyed order of samples, and their generators
pixels.py   the fast loader's decoder and kernels
augment.py  image and batch transforms
"""
