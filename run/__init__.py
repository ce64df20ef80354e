"""What a run is made of and what it leaves behind: a command line in; settings, checkpoints and records out.

errors.py      the exception for what a user can put right
config.py      every setting, once: default, YAML key, flag and help
optim.py       optimiser, schedule, EMA
clipping.py    gradient clipping
checkpoint.py  read, save, resume, fine-tune
records.py     log.txt, args.yaml, boards
"""
