"""What a model writes with each strategy, in figures and on a page."""
