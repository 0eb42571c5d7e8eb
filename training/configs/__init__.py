"""Hyperparameters of all training commands: one dataclass for each recipe, whose defaults are the first preset.

``--set`` changes a number of a preset. The text in the type of a number is its help. The preset "own" trains on the
user's data.

Recipes with ``ema_decay`` publish an exponential moving average of the weights. Learning rates follow a cosine
schedule, except in the GANs and in the recipes of airbench95 and 96.
"""
