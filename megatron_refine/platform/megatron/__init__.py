"""What Megatron-Core needs from us, a file a subject; each change says why it is made, and for which versions.

install.py    makes all changes, once
cpu.py        a CPU in the place of its GPU: devices by name, compiled fusions
streams.py    its named random streams, on a CPU
optimizer.py  the distributed optimizer's defects
saves.py      the process that its saves collect their results in
version.py    which one is installed

An entry point calls `install` before it imports anything of megatron.core: later, Inductor is imported for nothing.
"""
