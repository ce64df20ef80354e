"""What tasks beyond classification share: a classifier's feature maps under a pyramid, its weights and statistics, its published names.

pyramid.py  a classifier's feature maps, and the pyramid on top of them
running.py  training and evaluating on them, whatever is learnt
config.py   the settings of both
class_report.py what an evaluation found of each class, as a page, numbers or a table
weights.py  a classifier's checkpoint as the start of another network; what weight decay spares
exporting.py what the export and timing commands must know; bare feature maps
pictures.py colours, overlays and sheets of what is found in pictures; predict.py's loop over them
names.py    the published names of backbones and pyramids, and how names are translated
"""
