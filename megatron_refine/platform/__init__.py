"""What the program runs on.

hardware.py    a GPU or the CPU: its name, memory, clock and graphs; the only file that knows CUDA
rendezvous.py  how the ranks meet, and how other processes meet them
megatron/      what Megatron-Core needs from us: repairs, and a CPU in the place of its GPU

Nothing here acts on import. A program of one's own calls `install` before it imports Megatron-Core, then
`init_process_group` on each rank.
"""


def install() -> None:
    """Make Megatron-Core usable on this machine, once in a process: megatron/install.py."""
    from megatron_refine.platform.megatron.install import install

    install()


def init_process_group(timeout_minutes: float) -> None:
    """Join the default group, of the ranks that the launcher has started: rendezvous.py. Raises LaunchError."""
    from megatron_refine.platform.rendezvous import init_process_group

    init_process_group(timeout_minutes)
