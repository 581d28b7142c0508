"""What a model has learned, on text that it was not trained on."""
