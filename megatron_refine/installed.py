"""To be imported before anything of megatron.core: makes it usable on this machine. (Imports are sorted that way.)"""

from megatron_refine import platform

platform.install()
