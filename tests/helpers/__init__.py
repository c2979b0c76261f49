"""What several tests share: the default model and small generated ones."""
