"""Does REFINE teach a model anything? A study at the scale of a laptop, from runs of the trainer itself.

plan.py       what runs, from a file that is fixed beforehand;  run.py  the runs, two at a time, resumed
documents.py  texts that store values under keys and ask for them;  start.py  weights that can learn to answer
rewards.py    rewards dealt anew, the control
findings.py   differences between arms, paired over bases;  page.py  docs/learning.md
"""
