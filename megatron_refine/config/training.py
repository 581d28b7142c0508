"""Sections on how a run trains: layout, optimizer, phases, REFINE and its update."""

from typing import Literal

from pydantic import Field

from megatron_refine.config.base import Section


class TestTime(Section):
    """Test-time training."""

    reset: Literal["per_batch", "online"] = Field(
        "per_batch",
        description="per_batch: every batch starts from the same weights and a fresh optimizer; online: the batches "
        "before it remain, as in the official code",
    )


class Parallel(Section):
    tp: int = Field(1, ge=1, description="tensor parallel size")
    sp: bool = Field(False, description="sequence parallel (with tp > 1)")
    cp: int = Field(1, ge=1, description="context parallel size")
    pp: int = Field(1, ge=1, description="pipeline parallel size")

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.cp * self.pp


class Optimizer(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0, description="floor of the cosine and linear schedules")
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="in training steps (batches)")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="not applied to norms and other vectors")
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm")


class Train(Section):
    phase: Literal["midtrain", "posttrain", "testtime"] = Field(
        "midtrain",
        description="midtrain: on documents; posttrain: on prompts, then on their answers; testtime: on the prompts of "
        "each test batch, which is then answered",
    )
    match: Literal["data", "optimizer_steps", "compute"] = Field(
        "data",
        description="what a baseline (refine.enabled=false) shares with the REFINE run of the same configuration: its "
        "batches; these and the optimizer steps of each; or the optimizer steps of each batch and the FLOPs in all",
    )
    steps: int = Field(
        100, ge=1, description="batches in all, NTP-only ones included; testtime: one pass over task.paths instead"
    )
    global_batch_size: int = Field(128, ge=1, description="sequences a batch, over all ranks")
    micro_batch_size: int = Field(1, ge=1, description="sequences a forward pass, per rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in the backward pass: of some modules of each layer, or whole layers"
    )
    recompute_modules: list[Literal["mixer", "mlp"]] = Field(
        ["mixer"], description="what recompute=selective recomputes"
    )
    backend: Literal["auto", "te", "local"] = Field(
        "local", description="linear layers of the MLP: Megatron's; Transformer Engine's; auto: these where installed"
    )
    max_skipped_steps: int = Field(3, ge=0, description="non-finite steps skipped in a row before the run stops")


class Refine(Section):
    enabled: bool = Field(True, description="false: next-token prediction only")
    start_step: int = Field(0, ge=0, description="batches of NTP-only warm-up before the first REFINE step")
    num_chunks: int = Field(8, ge=1, description="c: selected positions a sequence")
    rollout_len: int = Field(5, ge=1, description="k: tokens a rollout")
    num_rollouts: int = Field(1, ge=1, description="n: rollouts a position")
    selection: str = Field("entropy", description="entropy, uniform, argmax, argmin or an import path module:function")
    temperature: float = Field(1.0, gt=0, description="of the selection's softmax")
    margin: int = Field(20, ge=1, description="tokens at either end where no rollout starts")
    reward: str = Field("cosine", description="cosine, binary, hybrid or an import path module:function")
    rollout_temperature: float = Field(1.0, ge=0, description="of the rollouts and of their probabilities; 0: greedy")
    advantage_eps: float = Field(1e-6, gt=0, description="added to the group's standard deviation")
    ntp_coef: float = Field(1.0, ge=0)
    nsp_coef: float = Field(0.2, ge=0)
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float = Field(3.0, gt=1, description="bound of the loss for negative advantages")


class Update(Section):
    mode: Literal["auto", "fused", "two_pass"] = Field(
        "auto", description="auto: fused where it is the same algorithm (one optimizer step a batch, pp=1)"
    )
    mini_batch_size: int = Field(0, ge=0, description="sequences an optimizer step; 0: the whole batch")
