"""What a teacher says of the student's images: mixed images in, labels out.

teacher.py    the network, its weights and its folding
labelling.py  stored labels in a run: fingerprint, checks, modes
store.py      the files they are stored in
"""
