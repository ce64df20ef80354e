"""How a network fares on images unlike those it learned from: folders of such sets and a network in; accuracies, corruption errors and a report out.

sets.py        the sets at the paths that are given, numbered by the network's classes; what of them is missing
scores.py      corruption errors, relative to AlexNet's or to the clean error
attacks.py     images changed against a network: FGSM, PGD
evaluation.py  a network on all of the sets, said in lines and written as JSON
recording.py   what is said of each validation image, noted while it is evaluated
corrupting.py  the fifteen corruptions of a folder of images, made and written
"""
