"""From --data-path to labelled images by index, wherever they lie: the same images in the same order from every kind of source.

sets.py     what a recipe trains and tests on: --data-path read, or a built-in set
finding.py  what lies there, split by split, and its parts opened
parts.py    a split as its source gives it: classes numbered, roots joined, subsets
folders.py  files of their own: class folders, Kaggle's layout, lists
archives.py tars and zips of class folders, WebDataset shards
parquet.py  rows of Hugging Face's parquet files
packed.py   packed files, as tools/pack_dataset.py writes them
stored.py   images inside larger files: what the kinds share
index.py    indexes: built once, kept, checked against the files
table.py    columns in a file that processes share
files.py    files on a disk or in a store, read at any place
remote.py   stores, read through a cache of blocks
cache.py    the local folder of indexes and blocks
packing.py  packed files written, gone on with, and checked
checking.py whole trees read as the loaders read them
progress.py how far a long pass is
"""
