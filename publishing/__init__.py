"""From a checkpoint to what others download: a run in, weights and a model card out. The card's text is `model_card_template.md`.

weights.py  weights alone, checked, and evaluated before an accuracy is named
hub.py      a timm model in a folder or on the Hugging Face hub
"""
