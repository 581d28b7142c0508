"""The numbers of the REFINE paper: arXiv 2602.16704v1, tables 3 to 7 and E.1, figure 5.

Figures without printed numbers are not here: 4, E.1, E.2, E.3, and of figure 5 all but both ends of c.
"""

# Table 3: recall at 4K, 8K, 16K and its mean, of single, multi-key, multi-query and multi-value needles, in percent
_NIAH = {
    "lact_760m": {
        "start": "98.8 91.2 95.8 95.3 70.2 44.8 24.2 46.2 39.2 24.9 17.4 27.1 40.6 27.0 17.7 28.4",
        "mid_sft": "98.4 90.8 97.6 95.6 70.6 45.0 24.2 46.6 40.7 25.2 17.4 27.8 41.7 26.3 17.7 28.5",
        "mid_refine": "99.0 93.0 96.8 96.3 70.4 46.0 26.6 47.7 40.5 25.8 18.0 28.1 41.2 29.5 18.6 29.8",
    },
    "delta_net_1.3b": {
        "start": "100 100 100 100 23.6 17.8 3.4 14.9 27.7 3.9 1.8 11.1 23.9 5.4 2.0 10.4",
        "mid_sft": "100 100 100 100 23.8 19.2 7.8 16.9 33.2 16.8 3.5 17.8 28.3 19.3 3.7 17.1",
        "mid_refine": "100 100 99.8 99.9 25.0 21.4 8.8 18.4 37.3 18.8 3.6 19.9 29.0 20.4 4.0 17.8",
    },
}
# Table 4: recall at 4K, 8K, 16K and its mean, of SQuADQA and HotpotQA, in percent
_RULER_QA = {
    "lact_760m": {
        "start": "17.5 14.0 6.5 12.7 20.5 14.5 12.0 15.7",
        "mid_sft": "19.5 14.0 6.0 13.2 21.5 15.0 12.0 16.2",
        "mid_refine": "20.5 15.5 8.0 14.7 23.0 16.0 12.5 17.2",
        "post_sft": "30.5 20.0 7.5 19.3 25.0 16.5 11.5 17.7",
        "post_nested_sft": "38.0 20.0 7.5 21.8 24.0 16.0 12.5 17.5",
        "post_nested_refine": "43.5 24.5 8.5 25.5 27.0 19.5 13.0 19.8",
        "qa_ttt_sft": "43.5 21.5 8.5 24.5 26.5 24.0 13.0 21.2",
        "qa_ttt_refine": "45.5 25.5 10.0 27.0 28.5 25.5 15.0 23.0",
    },
    "delta_net_1.3b": {
        "start": "11.0 5.0 2.0 6.0 10.0 3.0 2.5 5.2",
        "mid_sft": "9.0 6.0 3.0 6.0 9.0 8.0 4.5 7.2",
        "mid_refine": "10.0 6.5 4.0 6.8 12.0 9.5 5.5 9.0",
        "post_sft": "11.0 7.0 5.0 7.7 14.0 11.0 6.5 10.5",
        "post_nested_sft": "12.0 8.0 5.0 8.3 16.5 10.0 7.5 11.3",
        "post_nested_refine": "14.0 10.5 6.5 10.3 15.0 11.0 8.5 11.5",
        "qa_ttt_sft": "16.5 10.5 6.5 11.2 16.0 10.5 6.5 11.0",
        "qa_ttt_refine": "17.5 12.5 7.0 12.3 18.0 13.5 8.0 13.2",
    },
}
# Table 5: the twelve tasks of LongBench and their mean, in the order of the table
_LONGBENCH = {
    "lact_760m": {
        "start": "6.5 10.5 7.2 11.7 9.8 13.6 9.2 14.2 10.5 8.0 26.7 29.7 13.1",
        "mid_sft": "5.8 10.1 7.4 12.6 9.2 13.1 10.5 13.8 7.5 12.2 29.8 30.1 13.5",
        "mid_refine": "6.5 11.1 12.6 19.6 18.0 14.3 15.9 17.0 11.0 12.9 32.9 31.1 16.9",
        "ttt_sft": "5.1 12.6 13.5 15.9 18.4 13.2 16.2 17.4 12.5 16.2 32.0 31.4 17.0",
        "ttt_refine": "6.7 14.5 14.1 18.4 22.8 13.9 15.9 17.4 15.5 11.8 32.2 32.3 18.0",
    },
    "delta_net_1.3b": {
        "start": "6.5 8.7 10.0 4.8 6.4 12.4 16.3 9.4 17.7 15.1 33.8 29.0 14.2",
        "mid_sft": "5.7 9.4 8.3 9.2 8.6 14.7 16.1 15.5 22.9 15.2 33.1 29.2 15.7",
        "mid_refine": "6.5 9.5 10.1 9.6 8.7 15.2 15.0 16.2 25.0 21.4 35.9 31.1 17.0",
        "ttt_sft": "7.2 9.6 10.5 6.8 7.2 14.9 16.2 17.3 28.0 16.6 34.1 29.2 16.5",
        "ttt_refine": "7.5 9.2 11.5 9.5 8.6 14.7 16.1 16.5 31.5 24.7 35.2 30.0 17.9",
    },
}
# Tables 5 to 7 and figure 5: the mean over the twelve tasks
_LONGBENCH_MEAN = {
    "lact_760m": {
        "start": "13.1", "mid_sft": "13.5", "mid_refine": "16.9", "mid_binary": "16.6", "mid_uniform": "16.2",
        "mid_argmax": "16.4", "mid_argmin": "16.6", "mid_c2": "16.5", "ttt_sft": "17.0", "ttt_cosine": "17.5",
        "ttt_refine": "18.0",
    },
    "delta_net_1.3b": {
        "start": "14.2", "mid_sft": "15.7", "mid_refine": "17.0", "mid_binary": "16.5", "mid_uniform": "15.9",
        "mid_argmax": "16.7", "mid_argmin": "16.8", "mid_c2": "16.3", "ttt_sft": "16.5", "ttt_cosine": "17.6",
        "ttt_refine": "17.9",
    },
}  # fmt: skip
# Table E.1: two perplexities, eight accuracies in percent, and the mean of the last six
_SHORT = {
    "lact_760m": {
        "start": "20.8 29.8 36.7 66.0 32.4 67.5 41.5 53.4 48.4 27.6 45.1",
        "mid_sft": "20.7 28.9 37.2 66.2 32.9 67.4 41.4 52.5 48.4 27.1 45.0",
        "mid_refine": "20.8 30.2 36.1 66.5 32.3 67.3 41.4 52.8 48.8 27.5 45.0",
    },
    "delta_net_1.3b": {
        "start": "16.7 14.7 18.0 54.4 43.0 70.8 50.5 53.7 58.3 25.9 50.4",
        "mid_sft": "16.8 15.3 17.7 54.5 42.7 71.1 50.1 53.8 58.4 26.4 50.4",
        "mid_refine": "16.8 15.6 17.5 54.5 42.2 71.1 50.2 53.6 58.1 26.2 50.2",
    },
}
PUBLISHED = {
    "niah": _NIAH, "ruler_qa": _RULER_QA, "longbench": _LONGBENCH, "longbench_mean": _LONGBENCH_MEAN, "short": _SHORT,
}  # fmt: skip


def published(table: str, model: str, run: str) -> list[float]:
    """The printed numbers of a row, [] where the paper has none."""
    return [float(number) for number in PUBLISHED.get(table, {}).get(model, {}).get(run, "").split()]
