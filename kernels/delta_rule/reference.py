"""The (gated) delta rule as its recurrence: slow, obvious, the truth that the fast paths are held to."""

import torch
from torch import Tensor


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(K)   (arXiv 2406.06484; gated: 2412.06464).

    Args: q, k [N, T, H, K]; v [N, T, H, V]; beta, g [N, T, H], g a log decay; state [N, H, K, V] or None for zeros.
    Returns: o [N, T, H, V] and the T+1 states [N, H, K, V] before each token and after the last.
    """
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    states, outputs = [state], []
    for t in range(k.shape[1]):
        if g is not None:
            state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("nhkv,nhk->nhv", state, k[:, t])
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t]) * q.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outputs, 1), states
