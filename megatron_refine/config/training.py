"""Sections on how a run trains: layout, optimizer, phases, REFINE and its update."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_refine.config.base import Section

REWARDS = ("cosine", "binary", "hybrid")
SELECTIONS = ("entropy", "uniform", "argmax", "argmin")


def one_of(*known: str) -> AfterValidator:
    """Let a text be one of these names, or the import path `module:function` of a function of the user's own."""

    def check(name: str) -> str:
        if name not in known and ":" not in name:
            named = ", ".join(filter(None, known))
            raise ValueError(f"unknown; choose one of {named}, or an import path module:function")
        return name

    return AfterValidator(check)


COLDEST = 1e-6  # least temperature above 0: what is divided by less gets infinite


def temperature_of_draws(temperature: float) -> float:
    """Refuse what logits cannot be divided by. 0 is greedy."""
    if 0 < temperature < COLDEST:
        raise ValueError("must be 0, for greedy rollouts, or 1e-6 or more")
    return temperature


class TestTime(Section):
    """Test-time training: docs/phases.md."""

    reset: Literal["per_batch", "online"] = Field(
        "per_batch",
        description="`per_batch`: every batch starts from the same weights with a fresh optimizer. `online`: weights "
        "and optimizer carry over from batch to batch, as in the official code.",
    )


class Parallel(Section):
    """Layout of the ranks. The data-parallel size dp is the number of ranks divided by `tp*cp*pp`."""

    tp: int = Field(
        1, ge=1, description="Tensor-parallel size. Divides heads, `model.intermediate_size` and the padded vocabulary."
    )
    sp: bool = Field(False, description="Sequence parallelism of the tensor-parallel ranks. Needs `parallel.tp` > 1.")
    cp: int = Field(1, ge=1, description="Context-parallel size. `tp*cp` divides the heads of the mixer.")
    pp: int = Field(1, ge=1, description="Pipeline-parallel size. Above 1 the update takes two passes.")
    stages: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="Layers of each pipeline stage, such as `[7, 7, 6, 4]`: the last one has the output layer too. "
        "Empty: as many in each.",
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.cp * self.pp

    def layers(self, num_layers: int) -> list[int]:
        """Return how many layers each pipeline stage of a model has."""
        return self.stages or [num_layers // self.pp] * self.pp


class Optimizer(Section):
    """Adam, with Megatron's distributed optimizer: data-parallel ranks share out the moments and fp32 weights.

    Or Muon for the matrices of linear layers, and Adam for all else, on every data-parallel rank: see
    docs/compatibility.md. Both have the same rates and weight decay.
    """

    kind: Literal["adam", "muon"] = Field(
        "adam", description="`muon` needs Megatron-Core 0.19 and NVIDIA's package emerging_optimizers."
    )
    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine and linear schedules.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="Learning rate after the warm-up: constant, or down to `optimizer.min_lr` at `train.steps`. It "
        "changes once a batch.",
    )
    warmup_steps: int = Field(0, ge=0, description="Length of the linear warm-up, in training steps (batches).")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay rate of Adam's first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay rate of Adam's second moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Decay rate of Muon's momentum.")
    muon_steps: int = Field(
        5,
        ge=5,
        multiple_of=5,
        description="Newton-Schulz iterations of Muon's update, in fives: it has five sets of coefficients.",
    )
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = Field(
        "spectral",
        description="Length of Muon's update of a matrix [out, in], as a factor: sqrt(max(out, in)), "
        "sqrt(max(1, out/in)) or sqrt(out/in).",
    )
    muon_scale: float = Field(
        0.2,
        gt=0,
        description="One more factor. With `spectral`, 0.2 makes the update about as long as Adam's (arXiv "
        "2502.16982), so that one `optimizer.lr` suits both.",
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay. Norms and other vectors have none.")
    clip_grad: float = Field(1.0, gt=0, description="Global norm to which gradients are clipped.")

    @property
    def distributed(self) -> bool:
        """Tell whether data-parallel ranks share out what the optimizer holds. Muon needs whole matrices."""
        return self.kind == "adam"


class Train(Section):
    """Phase, batches and precision. What each phase reads and does: docs/phases.md."""

    phase: Literal["midtrain", "posttrain", "testtime"] = Field(
        "midtrain",
        description="`midtrain`: train on documents. `posttrain`: on prompts, then on their answers. `testtime`: on "
        "the prompts of each test batch, which is then answered.",
    )
    match: Literal["data", "optimizer_steps", "compute"] = Field(
        "data",
        description="What a baseline (`refine.enabled=false`) shares with the REFINE run of the same configuration. "
        "`data`: the batches. `optimizer_steps`: also the optimizer steps of each batch. `compute`: the optimizer "
        "steps of each batch and the FLOPs in all.",
    )
    steps: int = Field(
        100,
        ge=1,
        description="Batches in all, NTP-only ones included. testtime takes one pass over `task.paths` instead.",
    )
    global_batch_size: int = Field(128, ge=1, description="Sequences of a batch, over all ranks.")
    micro_batch_size: int = Field(1, ge=1, description="Sequences of a forward pass, per data-parallel rank.")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="Type of weights and activations. Gradients are reduced, states and logits computed, in fp32.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute activations in the backward pass. `selective`: those of `train.recompute_modules`. "
        "`full`: those of whole layers.",
    )
    recompute_modules: list[Literal["mixer", "mlp"]] = Field(
        ["mixer"], description="Modules of each layer that `train.recompute=selective` recomputes."
    )
    backend: Literal["auto", "te", "local"] = Field(
        "local",
        description="Linear layers of the MLP. `local`: Megatron's. `te`: Transformer Engine's, which have never run "
        "with this trainer. `auto`: `te` where it is installed.",
    )
    overlap: Literal["auto", "true", "false"] = Field(
        "auto",
        description="Reduce gradients over data-parallel ranks bucket by bucket while the backward pass goes on, and "
        "gather new weights while the next forward pass does. `auto`: on a GPU. Both are the same either way.",
    )
    bucket_millions: float = Field(
        40.0,
        gt=0,
        description="Parameters of a bucket that is reduced or gathered at once, in millions. See `train.overlap`.",
    )
    autotune: bool = Field(
        False,
        description="Let the Triton kernels of a GPU search among all of their configurations, for minutes in the "
        "first steps. false: those that are pinned for its architecture. See docs/gpu.md.",
    )
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="Most steps skipped in a row because loss or gradient is not finite. One more ends the run.",
    )

    @property
    def dtype(self) -> str:
        """Return torch's name of the precision."""
        return {"fp32": "float32", "bf16": "bfloat16"}[self.precision]


class Refine(Section):
    """REFINE: rollouts from selected positions of a sequence, rewarded by what follows there in truth.

    A sequence is long enough for rollouts with max(c, margin + max(margin, k)) real tokens. Shorter ones train NTP
    only.

    With T = `refine.rollout_temperature`, rollout tokens are drawn from softmax(logits / T), and their
    log-probabilities, old, new and the engine's, are of that distribution. Greedy rollouts (T = 0) are scored at 1. The
    NTP loss and the entropy that selects positions are at 1 whatever T is.
    """

    enabled: bool = Field(True, description="Train with REFINE. false: next-token prediction (NTP) only.")
    start_step: int = Field(0, ge=0, description="NTP-only batches before the first REFINE step.")
    num_chunks: int = Field(8, ge=1, description="c: selected positions of a sequence, one in each of c chunks.")
    rollout_len: int = Field(5, ge=1, description="k: tokens of a rollout.")
    num_rollouts: int = Field(
        1,
        ge=1,
        description="n: rollouts from each position. With 1 a GRPO group is the positions of a sequence, else the "
        "rollouts from a position, unless `refine.group` says another.",
    )
    group: Literal["auto", "sequence", "position"] = Field(
        "auto",
        description="The rollouts whose rewards are a GRPO group. `sequence`: all c * n of a sequence. `position`: the "
        "n of a position, which needs n > 1. `auto`: `sequence` where n is 1, else `position`, as in the official "
        "code.",
    )
    selection: Annotated[str, one_of(*SELECTIONS)] = Field(
        "entropy",
        description="How positions are selected: `entropy`, `uniform`, `argmax`, `argmin`, or the import path "
        "`module:function` of a rule of your own.",
    )
    temperature: float = Field(1.0, ge=COLDEST, description="Temperature of the softmax that a position is drawn from.")
    margin: int = Field(20, ge=1, description="Tokens at either end of a sequence from which no rollout starts.")
    reward: Annotated[str, one_of(*REWARDS)] = Field(
        "cosine",
        description="Reward of a rollout: `cosine` (of hidden states), `binary` (share of tokens that match), `hybrid` "
        "(their sum), or the import path `module:function` of one of your own.",
    )
    rollout_temperature: Annotated[float, AfterValidator(temperature_of_draws)] = Field(
        1.0, ge=0, description="T: temperature at which rollouts are drawn and scored. 0: greedy rollouts."
    )
    ban_eos: bool = Field(
        True,
        description="Never draw a token that ends a text in a rollout, as the official code does. Log-probabilities "
        "stay those of the whole vocabulary. false: draw it like any other; it ends no rollout.",
    )
    advantage_eps: float = Field(
        1e-6, gt=0, description="Epsilon that is added to the standard deviation of a group's rewards."
    )
    advantage_std: bool = Field(
        True, description="Divide advantages by the standard deviation of their group. false: subtract its mean alone."
    )
    loss_mean: Literal["token", "sequence"] = Field(
        "token",
        description="The policy loss is a mean over rollout tokens, or over rollouts, each the sum over its k tokens.",
    )
    ntp_coef: float = Field(1.0, ge=0, description="Weight of the NTP loss in a REFINE step.")
    nsp_coef: float = Field(0.2, ge=0, description="Weight of the NSP (policy) loss in a REFINE step.")
    clip_low: float = Field(0.2, gt=0, lt=1, description="Clips the importance ratio to 1 - clip_low from below.")
    clip_high: float = Field(0.2, gt=0, description="Clips the importance ratio to 1 + clip_high from above.")
    dual_clip: float = Field(
        3.0, gt=1, description="Bounds the policy loss at a negative advantage A: it is at most `-dual_clip * A`."
    )


class Update(Section):
    """Update of the weights by a batch."""

    mode: Literal["auto", "fused", "two_pass"] = Field(
        "auto",
        description="`fused`: the update uses the graphs of scoring and rescoring. `two_pass`: it computes both again. "
        "`auto`: fused where that is the same algorithm (one optimizer step a batch, `parallel.pp=1`). See "
        "docs/branch-packing.md.",
    )
    mini_batch_size: int = Field(
        0,
        ge=0,
        description="Sequences of an optimizer step. Divides `train.global_batch_size`. 0: the whole batch.",
    )
