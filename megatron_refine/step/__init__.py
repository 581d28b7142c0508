"""A REFINE step: select, reward, advantage and objective are pure functions on tensors; refine.py makes a step of them."""
