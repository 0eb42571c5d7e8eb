"""Training loops, and the code that they share: time budgets, training in several processes, and the best weights."""
