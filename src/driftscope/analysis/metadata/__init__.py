"""What a model says of itself: its facts, what is odd about them, and in what two models differ."""
