"""What a run is made of and what it leaves behind: a command line in; settings, checkpoints and records out.

errors.py      the exceptions for what a user can put right
config.py      every setting, once: default, YAML key, flag and help
optim.py       optimiser, schedule, EMA
clipping.py    gradient clipping
checkpoint.py  read, save, resume, fine-tune
integrity.py   checksums inside checkpoints
folder.py      the run's folder: its lock, and what in it to continue from
disk.py        whole files or none, and what to do where the disk is full
records.py     log.txt, args.yaml, boards
"""
