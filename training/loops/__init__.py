"""Training loops and what they share: time budgets, several processes, the best weights."""
