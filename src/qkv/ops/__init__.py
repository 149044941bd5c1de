"""The equations as pure functions on tensors: the naive form first, the fast forms checked against it."""
