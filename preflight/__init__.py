"""What a run needs, looked at before it: settings in; all faults, and what the run will cost, out.

rehearsal.py  everything that stands between a recipe and its first step, in order
images.py     images per class, some of them decoded
cost.py       memory and time of a step, hours of a run
room.py       room on the disks for checkpoints and labels
"""
