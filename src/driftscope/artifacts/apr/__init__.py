"""The .apr container, version 2: its layout, its dtypes, its hyperparameters and its tokenizer."""
