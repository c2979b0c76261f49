"""Contracts: registered hypotheses, gates and published figures, and how they are judged."""
