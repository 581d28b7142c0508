"""What is reproduced: the training runs by name, and the rows and columns of each table and figure, as data."""

from dataclasses import dataclass

from megatron_refine.eval.tasks import GROUPS

MODELS = ("delta_net_1.3b", "lact_760m")
START = "start"  # the model that every chain begins with
SFT = "refine.enabled=false"
QA = ("update.mini_batch_size=8", "update.mode=auto")  # a test batch of RULER QA is one optimizer step


@dataclass(frozen=True)
class Run:
    """A training run: its phase, the run whose weights it starts from, and what it sets beside its preset."""

    phase: str
    start: str
    keys: tuple[str, ...] = ()


_MID: dict[str, tuple[str, ...]] = {
    "refine": (), "refine_seed2": ("run.seed=2",), "refine_seed3": ("run.seed=3",),
    "sft": (SFT,), "sft_seed2": (SFT, "run.seed=2"), "sft_seed3": (SFT, "run.seed=3"),
    "sft_steps": (SFT, "train.match=optimizer_steps"), "sft_compute": (SFT, "train.match=compute"),
    "binary": ("refine.reward=binary",),
    **{mode: (f"refine.selection={mode}",) for mode in ("uniform", "argmax", "argmin")},
    **{f"k{k}": (f"refine.rollout_len={k}",) for k in (1, 3, 7)},
    **{f"c{c}": (f"refine.num_chunks={c}",) for c in (2, 4, 6)},
    **{f"n{n}": (f"refine.num_rollouts={n}",) for n in (2, 4)},
    "n4_sequence": ("refine.num_rollouts=4", "refine.group=sequence"),
    **{f"lambda_{x}": (f"refine.nsp_coef={x}",) for x in (0.1, 0.4)},
    **{f"tau_{x}": (f"refine.temperature={x}",) for x in (0.5, 2.0)},
}  # fmt: skip
MAIN = ("mid_refine", "mid_sft")  # with their further seeds evaluated on the held-out documents as in figure 4
RUNS: dict[str, Run] = {
    **{f"mid_{name}": Run("midtrain", START, keys) for name, keys in _MID.items()},
    "post_sft": Run("posttrain", "mid_refine", (SFT, "task.inner_step=false")),
    "post_nested_sft": Run("posttrain", "mid_refine", (SFT,)),
    "post_nested_refine": Run("posttrain", "mid_refine"),
    "qa_ttt_sft": Run("testtime", "post_nested_refine", (SFT, *QA)),
    "qa_ttt_refine": Run("testtime", "post_nested_refine", QA),
    "ttt_sft": Run("testtime", "mid_refine", (SFT,)),
    "ttt_refine": Run("testtime", "mid_refine"),
    "ttt_cosine": Run("testtime", "mid_refine", ("refine.reward=cosine",)),
}


@dataclass(frozen=True)
class Row:
    """What the paper calls a row, and its runs: several are seeds of one arm."""

    labels: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A cell of every row: the mean over the scores of its labels."""

    head: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A table or a figure."""

    title: str
    kind: str  # of its scores: niah, ruler_qa, longbench, short; steps: of training; entropy: of one text
    heads: tuple[str, ...]  # over the labels of its rows
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()
    table: str = ""  # of the published numbers
    metrics: tuple[str, ...] = ()  # of training, that a figure draws
    note: str = ""


LENGTHS = (4096, 8192, 16384)
_NEEDLES = {
    "S": "niah_single_1", "MK": "niah_multikey_1", "MQ": "niah_multiquery", "MV": "niah_multivalue",
}  # fmt: skip
LONGBENCH = tuple(GROUPS["longbench12"])
_ABBREVIATED = ("NQ", "QR", "MF", "HP", "2W", "QM", "MN", "SS", "TC", "TQ", "LC", "RP")
# lm-evaluation-harness: the task and its metric. Normalized accuracy where the authors of Gated DeltaNet take it
SHORT = {
    "Wiki ppl": "wikitext word_perplexity", "LMB ppl": "lambada_openai perplexity", "FDA": "fda contains",
    "SWDE": "swde contains", "LMB acc": "lambada_openai acc", "PIQA": "piqa acc", "Hella": "hellaswag acc_norm",
    "Wino": "winogrande acc", "ARC-e": "arc_easy acc", "ARC-c": "arc_challenge acc_norm",
}  # fmt: skip


def _by_length(tasks: dict[str, str]) -> tuple[Column, ...]:
    """A column a task and length, and one of each task's mean."""
    columns = []
    for head, task in tasks.items():
        labels = tuple(f"{task}@{length}" for length in LENGTHS)
        columns += [
            Column(f"{head} {n // 1024}K", (label,)) for n, label in zip(LENGTHS, labels, strict=True)
        ]
        columns.append(Column(f"{head} avg", labels))
    return tuple(columns)


def _rows(*rows: tuple[str, str]) -> tuple[Row, ...]:
    return tuple(Row(tuple(labels.split("|")), tuple(runs.split())) for labels, runs in rows)


def _averages(title: str, heads: tuple[str, ...], *rows: tuple[str, str], note: str = "") -> Item:
    """A table of means over LongBench's twelve tasks."""
    columns = (Column("LongBench avg", LONGBENCH),)
    return Item(title, "longbench", heads, _rows(*rows), columns, "longbench_mean", note=note)


_MIDS = _rows(("-", START), ("SFT", "mid_sft"), ("ReFINE", "mid_refine"))
_SEEDS = _rows(("SFT", "mid_sft mid_sft_seed2 mid_sft_seed3"),
               ("ReFINE", "mid_refine mid_refine_seed2 mid_refine_seed3"))  # fmt: skip
_OURS = "The paper has no such experiment."

ITEMS: dict[str, Item] = {
    "tab3": Item(
        "Table 3: needles in a haystack (RULER) after mid-training, recall in percent", "niah", ("Mid",), _MIDS,
        _by_length(_NEEDLES), "niah",
        note="S is niah_single_1, MK niah_multikey_1. The paper does not say which single-needle task S is. Its 100.0 "
        "for DeltaNet at every length fits the repeated noise of niah_single_1 alone: the authors of Gated DeltaNet "
        "(arXiv 2412.06464, table 3) give DeltaNet 98.8 at 8K there, and 14.4 on niah_single_2. The paper prints 46.2 "
        "as LaCT's MK average before mid-training; its three cells average 46.4.",
    ),
    "tab4": Item(
        "Table 4: multi-document question answering (RULER), recall in percent", "ruler_qa", ("Mid", "Post", "TTT"),
        _rows(
            ("-|-|-", START), ("SFT|-|-", "mid_sft"), ("ReFINE|-|-", "mid_refine"), ("ReFINE|SFT|-", "post_sft"),
            ("ReFINE|Nested SFT|-", "post_nested_sft"), ("ReFINE|Nested ReFINE|-", "post_nested_refine"),
            ("ReFINE|Nested ReFINE|SFT", "qa_ttt_sft"), ("ReFINE|Nested ReFINE|ReFINE", "qa_ttt_refine"),
        ),
        _by_length({"SQuADQA": "ruler_squadqa", "HotpotQA": "ruler_hotpotqa"}), "ruler_qa",
        note="One model is trained for each task and length.",
    ),
    "tab5": Item(
        "Table 5: LongBench up to 16K", "longbench", ("Mid", "TTT"),
        _rows(("-|-", START), ("SFT|-", "mid_sft"), ("ReFINE|-", "mid_refine"), ("ReFINE|SFT", "ttt_sft"),
              ("ReFINE|ReFINE", "ttt_refine")),
        (*(Column(head, (task,)) for head, task in zip(_ABBREVIATED, LONGBENCH, strict=True)),
         Column("Avg", LONGBENCH)), "longbench",
    ),
    "fig4": Item(
        "Figures 4 and E.1: held-out documents (Booksum) during mid-training", "steps", ("Mid",), _SEEDS,
        metrics=("eval/sampled_accuracy", "eval/ntp_loss"),
        note="The accuracy is that of a sampled token, as in the official code, in expectation. The official loss of "
        "DeltaNet counts pads; here no pad counts.",
    ),
    "fig5": _averages(
        "Figure 5: rollout length k and number of chunks c", ("key", "value"),
        ("k|1", "mid_k1"), ("k|3", "mid_k3"), ("k|5", "mid_refine"), ("k|7", "mid_k7"), ("c|2", "mid_c2"),
        ("c|4", "mid_c4"), ("c|6", "mid_c6"), ("c|8", "mid_refine"),
        note="The paper prints no numbers but those at both ends of c.",
    ),
    "tab6": _averages(
        "Table 6: rewards in mid-training and at test time", ("Mid", "TTT"),
        ("binary|-", "mid_binary"), ("cosine|-", "mid_refine"), ("cosine|SFT", "ttt_sft"),
        ("cosine|cosine", "ttt_cosine"), ("cosine|binary", "ttt_refine"),
    ),
    "tab7": _averages(
        "Table 7: selection of positions in mid-training", ("selection",),
        ("uniform", "mid_uniform"), ("argmax of entropy", "mid_argmax"), ("argmin of entropy", "mid_argmin"),
        ("sampled by entropy", "mid_refine"),
    ),
    "fige2": Item("Figure E.2: entropy along one text", "entropy", ("Mid",), _rows(("-", START))),
    "fige3": Item(
        "Figure E.3: reward of the rollouts during mid-training", "steps", ("k",),
        _rows(("k=3", "mid_k3"), ("k=5", "mid_refine"), ("k=7", "mid_k7")),
        metrics=("rollout/reward_mean", "rollout/reward_std"),
    ),
    "tabe1": Item(
        "Table E.1: short contexts (lm-evaluation-harness)", "short", ("Mid",), _MIDS,
        (*(Column(head, (label,)) for head, label in SHORT.items()), Column("avg", tuple(list(SHORT.values())[4:]))),
        "short",
        note="The average is over the last six tasks. The paper does not say which accuracy it takes: here it is "
        "normalized for Hella and ARC-c.",
    ),
    "compute": _averages(
        "Matched baselines", ("Mid",), ("ReFINE", "mid_refine"), ("SFT, the same data", "mid_sft"),
        ("SFT, the same data and optimizer steps", "mid_sft_steps"), ("SFT, the same FLOPs", "mid_sft_compute"),
        note="The paper compares at the same data alone.",
    ),
    "rollouts": _averages(
        "Rollouts of a position", ("n",), ("1", "mid_refine"), ("2", "mid_n2"), ("4", "mid_n4"),
        note=f"{_OURS} With n > 1 the group of GRPO is the n rollouts of a position.",
    ),
    "group": _averages(
        "Group of GRPO", ("n", "group"), ("1|sequence", "mid_refine"), ("4|sequence", "mid_n4_sequence"),
        ("4|position", "mid_n4"), note=_OURS,
    ),
    "lambda": _averages(
        "Weight of the NSP loss", ("refine.nsp_coef",), ("0.1", "mid_lambda_0.1"), ("0.2", "mid_refine"),
        ("0.4", "mid_lambda_0.4"), note=_OURS,
    ),
    "tau": _averages(
        "Temperature of the selection", ("refine.temperature",), ("0.5", "mid_tau_0.5"), ("1.0", "mid_refine"),
        ("2.0", "mid_tau_2.0"), note=_OURS,
    ),
}  # fmt: skip
