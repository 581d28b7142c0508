"""What the program runs on.

hardware.py    a GPU or the CPU: its name, memory, clock and graphs; the only file that knows CUDA
rendezvous.py  how the ranks meet, and how other processes meet them
megatron/      what Megatron-Core needs from us: repairs, and a CPU in the place of its GPU

Nothing here acts on import.
"""
