"""flash-linear-attention's own model as a baseline: an NTP step of the same shape, on a GPU."""

from collections.abc import Callable
from typing import Any

from megatron_refine.config import Config, ConfigError
from megatron_refine.models import family
from megatron_refine.records import Batch


def ntp_step(config: Config) -> Callable[[Batch, int], dict[str, float]]:
    """What takes a step: fp32 weights, products in bf16 (autocast), torch's fused AdamW. Random weights.

    Raises ConfigError where the model or the machine does not allow it.
    """
    import torch

    from megatron_refine.platform import hardware

    model = build(config)
    if not hardware.has_gpu():
        raise ConfigError("--hf: flash-linear-attention's kernels need a GPU, and torch sees none")
    model = model.to(hardware.device()).train()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    size = config.train.micro_batch_size

    def step(batch: Batch, _: int) -> dict[str, float]:
        micros = [batch.tokens[i : i + size] for i in range(0, len(batch.tokens), size)]
        for tokens in micros:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss / len(micros)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return {}

    return step


def build(config: Config) -> Any:
    """The model of the configuration in flash-linear-attention's class, on the CPU, in fp32."""
    library = family.of(config.model.family).format.library
    if library != "flash-linear-attention":
        raise ConfigError(f"--hf: {config.model.family} is {library}'s; use a family of flash-linear-attention")
    try:
        import fla.models
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"--hf: {error}; pip install -e '.[gpu]'") from None
    from megatron_refine.convert.fields import fresh_config

    tree = fresh_config(config.model, "float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))
    assert type(model).__module__.startswith(fla.models.__name__), type(model)
    return model
