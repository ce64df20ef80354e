"""What a run is made of and what it leaves behind: a command line in; settings, checkpoints and records out.

errors.py      the exceptions for what a user can put right
command.py     flags, exit codes, and faults told in one line
console.py     standard output that may be closed or full, and a bar on a terminal
signals.py     requests to save and stop
settings.py    how settings are declared, read and shown
config.py      every setting, once: default, YAML key, flag and help
manifest.py    what stored labels say before torch is there
hardware.py    device, precision, layout
process.py     joining the other processes, and leaving them
compiling.py   networks through torch.compile
network.py     the network that a recipe names, and how it is trained
freezing.py    parts of it that do not learn
norms.py       BatchNorm over all processes
flips.py       a network asked of images and their mirror images
optim.py       optimiser, schedule, EMA
clipping.py    gradient clipping
skipping.py    steps that are not finite, left out on the device
watch.py       what to do about too many of them
state.py       what is trained: network, EMA, optimiser, schedule
checkpoint.py  read, save, resume, fine-tune
integrity.py   checksums inside checkpoints
folder.py      the run's folder: its lock, and what in it to continue from
disk.py        whole files or none, and what to do where the disk is full
records.py     log.txt, args.yaml, boards
trackers.py    Weights & Biases and trackio, where they are asked for
"""
