"""Pictures and label images come in; Semantic FPN on any classification backbone, keyed crops and mean IoU come out.

__main__.py    the command: `python -m segmentation`
config.py      its settings
training.py    a run's data, network, schedule, its part of the loop, and its evaluation
networks.py    `build`: the backbone of a name, its pyramid and the semantic head; the loss
exporting.py   a segmenter as the export commands take it
names.py       checkpoints with the published names, in both directions
classes.py     class names and colours: ADE20K's, a file's, or made ones
data.py        pairs of pictures and label images; what is wrong with them
cropping.py    the keyed augmentation: scale, crop, flip, photometric distortion
batches.py     the keyed order of a run, and its batches
saved.py       segmenters out of checkpoint files
painting.py    label images and overlays of what is found
evaluation.py  labels at the picture's size, confusion matrices, mean IoU
"""
