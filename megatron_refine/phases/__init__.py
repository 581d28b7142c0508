"""What a run does with a batch: mid-training, post-training, test-time training. The loop is the same for all."""
