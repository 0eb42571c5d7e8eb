"""Training of classifiers for users' photographs: pretrained networks with a new last layer."""
