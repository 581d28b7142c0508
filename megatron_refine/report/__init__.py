"""The records of a run: metrics.jsonl, the lines on the screen, report.html."""
