"""The paper's tables and figures (arXiv 2602.16704), each from its runs to its page."""
