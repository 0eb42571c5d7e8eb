"""Marks for the annotations of hyperparameters. They change the command-line options of the hyperparameters."""

SWITCH = "yes or no"  # marks numbers that are 1 or 0; their options take yes or no
PHOTOGRAPHS = "hyperparameters for photographs"  # marks numbers whose options the help lists under this title
