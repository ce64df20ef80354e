"""Images and a COCO-format annotation file come in; detectors on any classification backbone, keyed batches and COCO's average precision come out.

__main__.py    the command: `python -m detection`
config.py      its settings
training.py    a run's data, network, schedule, its part of the loop, and its evaluation
networks.py    `build`: Mask R-CNN, Faster R-CNN or RetinaNet of a backbone's name
matching.py    anchors, which object each one is for, keyed sampling of them
rcnn.py        region proposals, box and mask heads, their losses
retinanet.py   the one-stage head and its loss
saved.py       detectors out of checkpoint files, ready to find objects
exporting.py   a detector as the export commands take it, and how its file is compared
painting.py    what is found, in words and over the picture
names.py       checkpoints with the published names, in both directions
coco.py        annotation files: categories, images, objects; what is wrong with them
batches.py     the keyed order of a run, images and their objects resized, flipped and padded
evaluation.py  detections in COCO's format, and average precision over classes and per class
"""
