"""What a teacher says of the student's images: mixed images in, labels out.

teacher.py      the network, its weights and its folding
labelling.py    stored labels in a run: checks and modes
fingerprint.py  what labels are made for, by field
store.py        the files they are stored in
generate.py     labels made without a student
seen.py         images of a step as the student sees them, and the teacher's word on them
inspection.py   what a folder of labels holds
"""
