"""A REFINE step: select, reward, advantage, objective are pure functions on tensors; refine.py makes a step of them."""
