"""Gradients and optimizer state in the host's memory, while servers on the same GPU write rollouts."""

from torch import Tensor, UntypedStorage

from megatron_refine.platform import hardware
from megatron_refine.trainer.optimizer import Updater


class Offload:
    """Frees the device from construction to `restore`; the next step then has the bits that it would have had.

    The tensors and their views (param.main_grad, Megatron's shards) stay as they are: their storages are emptied and
    filled again. Weights stay on the device, and with them the main parameters of an fp32 model, which share their
    storage. Megatron frees the gradients. Its optimizers' own offload_to_cpu moves tensors of CUDA alone, and takes the
    main parameters of an fp32 model out of the weights' storage: a second copy on the GPU from then on.

    A CPU goes the same way, and its storages are empty meanwhile. That other processes find the memory free, and how
    long the copies take, only a GPU shows.
    """

    def __init__(self, updater: Updater, keep_gradients: bool):
        """keep_gradients: for between the backward passes of an optimizer step; else `restore` gives zeros.

        Nothing is freed before all is copied. Raises RuntimeError where the host has no memory for the copies.
        """
        model = self._model = updater.model
        buffers = (*model.buffers, *model.expert_parallel_buffers)
        gradients = [buffer.grad_data.untyped_storage() for buffer in buffers]
        state = _state(updater)
        kept = state + gradients if keep_gradients else state
        self.bytes = sum(storage.nbytes() for storage in state + gradients)  # that the device is free of
        self._copies = [(storage, UntypedStorage(storage.nbytes(), device="cpu").copy_(storage)) for storage in kept]
        for storage in state:
            storage.resize_(0)
        model.offload_grad_buffers(synchronize=hardware.has_gpu())  # also returns free memory to the device

    def restore(self) -> None:
        """Bring all of it back. Raises torch.OutOfMemoryError where others hold the device's memory."""
        self._model.restore_grad_buffers(synchronize=False)
        for storage, copy in self._copies:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self._copies.clear()


def _state(updater: Updater) -> list[UntypedStorage]:
    """The storages on the model's device of moments and main parameters, without those that hold weights."""
    weights = list(updater.model.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in weights}
    found: dict[int, UntypedStorage] = {}
    for adam in (part.optimizer for part in updater.parts):
        tensors = [parameter for group in adam.param_groups for parameter in group["params"]]
        tensors += [value for state in adam.state.values() for value in state.values() if isinstance(value, Tensor)]
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.device == weights[0].device):
            if storage.nbytes() and storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
    return list(found.values())
