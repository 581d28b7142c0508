"""What a model has learned, on text that it was not trained on.

heldout.py  loss and rollouts on held-out rows;  load.py  a model to evaluate;  answers.py  what it writes
tasks.py    the tasks by name, how they are read and scored;  metrics.py  the scores
ruler/      prompts made for any length;  files.py  prompts found in files
"""
