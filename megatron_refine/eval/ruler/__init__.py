"""RULER (arXiv 2404.06654): its thirteen tasks, generated offline for any length and tokenizer.

generate.py  the samples of a task;  fit.py  how large a haystack may be
niah.py      needles in a haystack, eight variants;  vt.py  variable tracking;  qa.py  questions on many documents
qa_files.py  the REFINE paper's files of such questions, for any tokenizer
cwe.py       common words;  fwe.py  frequent words
haystack.py  noise and prose;  words.py  word lists;  sample.py  what all tasks share

Definitions and wording are RULER's, the code and the word lists are not. What differs on purpose: keys, values and
variables of a sample never collide, every sample has a generator of its own, a length that is too short is an error,
and the haystack is filled up to a line, not to five hundred words.
"""

from megatron_refine.eval.ruler.generate import MAX_NEW_TOKENS, NIAH, generate, haystack_of

__all__ = ["MAX_NEW_TOKENS", "NIAH", "generate", "haystack_of"]
