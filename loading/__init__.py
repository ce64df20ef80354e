"""From a file to a batch: paths and keys in, augmented pixels out. `datasets.py` builds a recipe's loaders of these.

images.py    labelled images by index: reading and decoding files
keys.py      the keyed order of samples, and their generators
steps.py     steps of any keyed order, and loaders of them
decoding.py  JPEGs decoded as far as they are wanted
turning.py   photographs turned as their EXIF orientation says
pixels.py    the fast loader's crops and resizing
kernels.py   RandAugment's operations on uint8 arrays
sized.py     images that keep their ratio: fitted, aligned, padded, normalised
augment.py   image and batch transforms, mixing
batches.py   views written side by side, in shared memory
loaders.py   loader processes, and batches on the way to the device
transfer.py  what the host does not wait for
damage.py    damaged files that the loaders of all processes have met
"""
