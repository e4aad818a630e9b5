"""Pure functions on tensors: routing, activation, permutation, and the float64 oracle."""
