"""What a run tells of itself: metrics.jsonl, the lines on the screen, report.html."""
