"""What trained weights are made into without training: checkpoints in; their averages, with statistics to match, and what these recognise out.

recipe.py      the settings that a checkpoint was trained with, and the flags that take their place
members.py     the checkpoints to average: found, chosen, required to be alike
soups.py       means of weights: of all, or greedily of those that help
statistics.py  BatchNorm's statistics, taken anew from training images
trial.py       weights tried on images that choose and on images that judge
writing.py     the result as a checkpoint that says what it was made from
"""
